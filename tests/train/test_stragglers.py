"""A slow rank is reported after several slow readings in a row, and no other rank is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.comm.world import World
from tests.support.tiny import EXACT, trainer
from train.callbacks.logging import LoggingCallback
from train.run_directory import read_lines
from train.stragglers import KINDS, SLOW_HOSTS, STEADY, SlowRank, Stragglers

ALONE = World(0, 1, torch.device("cpu"))


def train(root: Path, overrides: list[str], slow: int | None) -> None:
    # no prefetch, with which a step would not wait for a slow batch
    run = trainer(root, "run", [*overrides, "logging.every=1", "data.prefetch=0"])
    os.environ["SLURMD_NODENAME"] = f"n{dist.get_rank()}"
    if dist.get_rank() == slow:
        honest = run.stragglers.probe
        run.stragglers.probe = lambda: honest() + 0.05
        load = next(iter(run.loaders.values()))
        batch = load.batch
        load.batch = lambda *arguments: (time.sleep(0.1), batch(*arguments))[1]
    logging = LoggingCallback(run)
    logging.before_training()
    for step in range(STEADY + 1):
        logging.after_step(step + 1, run.train_step(step))
    del os.environ["SLURMD_NODENAME"]


@pytest.mark.parametrize("slow", [1, None])
def test_a_slow_rank_is_named_in_the_metrics(ranks, small_corpus, tmp_path, slow):
    ranks(2, train, tmp_path, [*small_corpus, *EXACT], slow)
    lines = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    named = [[(one["rank"], one["kind"]) for one in line.get("slow_ranks", [])] for line in lines]
    noted = tmp_path / "run" / "logs" / SLOW_HOSTS
    if slow is None:
        assert not any(named) and not noted.exists()
        return
    assert named == [[]] * (STEADY - 1) + [[(1, kind) for kind in KINDS]] * 2
    assert "rank 1 on n1 is slow: matmuls take" in (tmp_path / "run" / "log.txt").read_text()
    (note,) = read_lines(noted)
    assert note["hosts"] == ["n1"] and note["step"] == STEADY and abs(note["time"] - time.time()) < 3600


def test_one_slow_reading_names_no_rank():
    stragglers = Stragglers(ALONE)
    slow, well = [[0.01, 0.0], [0.01, 0.0], [0.02, 0.0]], [[0.01, 0.0]] * 3
    assert [stragglers.judge(seconds) for seconds in (slow, slow, well, slow, slow)] == [[]] * 5
    assert stragglers.judge(slow) == [SlowRank(2, KINDS[0], 2.0)]
    assert not Stragglers(ALONE).judge([[1e-4, 0.0], [1e-3, 0.0]]), "too short to be significant"


def test_only_a_change_of_the_slow_hosts_is_noted(tmp_path):
    stragglers, path = Stragglers(ALONE), tmp_path / "logs" / SLOW_HOSTS
    one, other = SlowRank(2, KINDS[0], 2.0, "n2"), SlowRank(3, KINDS[1], 2.0, "n2")
    for step, slow in enumerate([[], [one], [one, other], [], [], [one], [one]]):
        stragglers.note(slow, step, path)
    Stragglers(ALONE).note([], 4, path)
    noted = [(line["step"], line["hosts"]) for line in read_lines(path)]
    assert noted == [(1, ["n2"]), (3, []), (5, ["n2"]), (4, [])], "a restart begins without slow hosts"
