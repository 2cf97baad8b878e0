"""A slow rank is named once it has been slow for a while, and nobody is named without reason."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.tiny import EXACT, trainer
from train.callbacks.logging import LoggingCallback
from train.stragglers import KINDS, SLOW_HOSTS, STEADY, SlowRank, Stragglers


def train(root: Path, overrides: list[str], slow: int | None) -> None:
    # made ahead, batches that take as long as this may cost nothing: what counts is how long a step waits for them
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
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    named = [[(one["rank"], one["kind"]) for one in line.get("slow_ranks", [])] for line in lines]
    noted = tmp_path / "run" / "logs" / SLOW_HOSTS
    if slow is None:
        assert not any(named) and not noted.exists()
        return
    assert named == [[]] * (STEADY - 1) + [[(1, kind) for kind in KINDS]] * 2
    assert "rank 1 on n1 is slow: matrix products take" in (tmp_path / "run" / "log.txt").read_text()
    (note,) = map(json.loads, noted.read_text().splitlines())
    assert note["hosts"] == ["n1"] and note["step"] == STEADY and abs(note["time"] - time.time()) < 3600


def test_one_bad_reading_between_good_ones_names_nobody():
    stragglers = Stragglers(trainer_world())
    slow, well = [[0.01, 0.0], [0.01, 0.0], [0.02, 0.0]], [[0.01, 0.0]] * 3
    assert [stragglers.judge(seconds) for seconds in (slow, slow, well, slow, slow)] == [[]] * 5
    assert stragglers.judge(slow) == [SlowRank(2, KINDS[0], 2.0)]
    assert not Stragglers(trainer_world()).judge([[1e-4, 0.0], [1e-3, 0.0]]), "too short to say anything"


def test_only_a_change_of_the_slow_hosts_is_noted(tmp_path):
    stragglers, path = Stragglers(trainer_world()), tmp_path / "logs" / SLOW_HOSTS
    one, other = SlowRank(2, KINDS[0], 2.0, "n2"), SlowRank(3, KINDS[1], 2.0, "n2")
    for step, slow in enumerate([[], [one], [one, other], [], []]):
        stragglers.note(slow, step, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["hosts"]) for line in lines] == [(1, ["n2"]), (3, [])]
    for step, slow in ((5, [one]), (6, [one])):
        stragglers.note(slow, step, path)
    Stragglers(trainer_world()).note([], 4, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["hosts"]) for line in lines[2:]] == [(5, ["n2"]), (4, [])], "started again, all is well"


def trainer_world():
    from parallel.comm.world import connect

    return connect()
