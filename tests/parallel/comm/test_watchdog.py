"""Which rank a waiting rank reports: silent ranks before late ones, and none while all are alive and in step."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from parallel.comm.watchdog import Heartbeat, Status, Watchdog, find_missing


def status(beat: int, step: int = 7, excused: int = 0, done: bool = False, host: str = "a", **begun: int) -> Status:
    return {"beat": beat, "step": step, "what": "x", "begun": begun, "excused": excused, "done": done, "host": host}


def reported(after: dict[int, Any]) -> tuple[str, list[str]] | None:
    """Return what rank 0 of 4 reports while it waits for rank 1 in its third collective over `ep`."""
    heartbeat = Heartbeat(step=7)
    for axis in ("ep", "ep", "tp", "ep"):
        heartbeat.begin(axis, "tokens")
    before = {0: status(1), 1: status(5, ep=3), 2: status(5, ep=1), 3: status(5, ep=1)}
    return find_missing(heartbeat, 0, 4, [0, 1], before, {0: status(2, ep=3, tp=1), **after})


NOW = {1: status(6, ep=3), 2: status(6, ep=1), 3: status(6, ep=1)}


def test_no_rank_is_reported_while_all_are_alive_and_in_step():
    assert reported(NOW) is None, "ranks 2 and 3 are in other groups"
    assert reported({**NOW, 3: status(5, done=True)}) is None, "a finished rank may be silent"


def test_a_rank_behind_in_its_group_is_reported():
    line, hosts = reported({**NOW, 1: status(6, step=6, host="b", ep=2)})
    assert line == "rank 1 is alive but at step 6 (last: x, on b)" and hosts == ["b"]
    assert reported({**NOW, 1: status(6, ep=2, excused=1)}) is None, "it has announced long work"


def test_a_silent_rank_comes_first_even_of_another_group():
    line, hosts = reported({**NOW, 1: status(6, ep=2), 3: status(5, step=4, host="c", ep=1)})
    assert line == "rank 3 has sent no heartbeat since step 4 (last: x, on c)" and hosts == ["c"]
    assert reported({rank: NOW[rank] for rank in (1, 2)}) == ("rank 3 has never sent a heartbeat", [])


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """Return the lines with which watchdogs would have ended their ranks; do not end the process."""
    lines: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, line, hosts: lines.append(line))
    return lines


def watched(tmp_path, ranks: list[int], size: int, seconds: float) -> None:
    """Run watchdogs with a limit of 0.2 s for `seconds`, while rank 0 has announced long work."""
    store, running = dist.HashStore(), []
    for rank in ranks:
        heartbeat = Heartbeat(step=7)
        heartbeat.begin("world", "wait for rank 0")
        running.append(Watchdog(heartbeat, store, rank, size, 0.2, tmp_path))
        time.sleep(0.03)  # so that the watchdogs do not run in step
    with running[0].heartbeat.excuse():
        time.sleep(seconds)
    for one in running:
        one.stop()


def test_no_rank_ends_while_rank_0_works_alone(tmp_path, ended):
    watched(tmp_path, [0, 1, 2, 3], 4, 2.0)
    assert ended == []


def test_a_rank_without_a_heartbeat_ends_the_others(tmp_path, ended):
    watched(tmp_path, [0, 1, 2], 4, 1.0)
    assert len(ended) >= 3 and all("rank 3 has never sent a heartbeat" in line for line in ended)
    assert ended[0].startswith("step 7: wait for rank 0 over axis world waits for ")


def test_a_store_that_is_gone_ends_the_rank(tmp_path, ended):
    class Gone(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

    one = Watchdog(Heartbeat(), Gone(), 0, 2, 0.2, tmp_path)
    time.sleep(0.8)
    one.stop()
    assert ended and ended[0] == "step 0: the store of the job no longer answers"
