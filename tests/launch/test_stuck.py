"""A collective that all ranks have begun and that completes on none ends the ranks together, with one report."""

from __future__ import annotations

import json
import time

import pytest

from tests.support.drills import STEPS, TWO_RANKS, ended, figures, has_step, kill_started, ranks_of, start, wait_for

pytestmark = pytest.mark.slow
LIMIT_S = 5
STUCK = '''
import os, time
from pathlib import Path

import torch
import torch.distributed as dist
from train.callbacks.base import Callback


class Stuck(Callback):
    """In step 30 of the first attempt, each rank waits in gloo for a tensor that no rank sends."""

    def __init__(self, trainer, excused=False):
        super().__init__(trainer)
        self.excused = excused

    def before_step(self, step):
        if step != 30 or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
            return
        if self.trainer.world.is_main:
            self.trainer.world.heartbeat.excused += self.excused
            (Path(self.trainer.directory.path) / "stuck").write_text(str(time.time()))
        dist.all_reduce = lambda tensor, **options: dist.recv(torch.empty(1), src=1 - dist.get_rank())
'''


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    kill_started()


@pytest.fixture
def stuck(small_corpus, tmp_path, monkeypatch):
    """Return a function that starts a run which gets stuck, and returns its process."""
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "stuck.py").write_text(STUCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))
    words = [*small_corpus, *TWO_RANKS, "run.name=x", f"parallel.timeout_s={LIMIT_S}"]

    def run(options: str):
        process = start([*words, f"callbacks=[{{target: 'stuck:Stuck', options: {options}}}]"], tmp_path)
        wait_for((tmp_path / "runs" / "x" / "stuck").exists, process)
        return process

    return run


def test_ranks_that_all_wait_in_one_collective_end_together(stuck, small_corpus, tmp_path):
    errors, run = ended(stuck("{}")), tmp_path / "runs" / "x"
    [report] = map(json.loads, (run / "logs" / "hangs.jsonl").read_text().splitlines())
    assert report["time"] - float((run / "stuck").read_text()) < LIMIT_S + 10
    words, line = report["line"], report["line"].partition(";")[0]
    assert line.startswith("step 30: ") and any(f" over axis {axis} waits for " in line for axis in ("world", "dp"))
    assert "; all 2 ranks wait, and this one is incomplete for the longest time, on ranks 0, 1: " in words
    told = [one for one in errors.splitlines() if one.startswith("leviathan: rank ")]
    assert told and words in told[0] and "restarts left: " in errors and "Traceback" not in errors
    ended(start([*small_corpus, *TWO_RANKS, "run.name=y"], tmp_path))
    assert figures(run) == figures(tmp_path / "runs" / "y") and len(figures(run)) == STEPS


def test_ranks_wait_for_one_that_has_announced_long_work(stuck, tmp_path):
    process = stuck("{excused: true}")
    time.sleep(LIMIT_S + 4)  # torch's own limit is 10 s later
    assert process.poll() is None and len(ranks_of(process)) == 2
    assert not (tmp_path / "runs" / "x" / "logs" / "hangs.jsonl").exists() and has_step(tmp_path / "runs" / "x", 30)()
