"""Whom a waiting rank names: the silent before the late, and nobody without reason."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from parallel.comm.watchdog import Heartbeat, Watchdog, find_missing


def word(
    beat: int, step: int = 7, excused: int = 0, done: bool = False, host: str = "a", **begun: int
) -> dict[str, Any]:
    return {"beat": beat, "step": step, "what": "x", "begun": begun, "excused": excused, "done": done, "host": host}


def waiting() -> Heartbeat:
    pulse = Heartbeat(step=7)
    for axis in ("ep", "ep", "tp"):
        pulse.begin(axis, "tokens")
    pulse.begin("ep", "tokens")
    return pulse


def named(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> tuple[str, list[str]] | None:
    return find_missing(waiting(), 0, 4, [0, 1], {0: word(1), **before}, {0: word(2, ep=3, tp=1), **after})


LIVES = {1: word(5, ep=3), 2: word(5, ep=1), 3: word(5, ep=1)}
NOW = {1: word(6, ep=3), 2: word(6, ep=1), 3: word(6, ep=1)}


def test_nobody_is_named_while_all_live_and_none_of_the_group_is_behind():
    assert named(LIVES, NOW) is None, "ranks 2 and 3 are in other groups"


def test_a_rank_behind_in_its_group_is_named():
    told, hosts = named(LIVES, {**NOW, 1: word(6, step=6, host="b", ep=2)})
    assert told == "rank 1 is alive but at step 6 (last: x, on b)" and hosts == ["b"]
    assert named(LIVES, {**NOW, 1: word(6, ep=2, excused=1)}) is None, "it has said that it takes long"


def test_a_silent_rank_comes_first_even_of_another_group():
    told, hosts = named(LIVES, {**NOW, 1: word(6, ep=2), 3: word(5, step=4, host="c", ep=1)})
    assert told == "rank 3 has sent no heartbeat since step 4 (last: x, on c)" and hosts == ["c"]


def test_who_is_done_may_be_silent_and_who_never_spoke_may_not():
    assert named(LIVES, {**NOW, 3: word(5, done=True)}) is None
    told, hosts = named(LIVES, {rank: NOW[rank] for rank in (1, 2)})
    assert told == "rank 3 has never sent a heartbeat" and hosts == []


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """What watches would have ended their ranks with."""
    lines: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, line, hosts: lines.append(line))
    return lines


def watches(tmp_path, ranks: list[int], size: int, limit_s: float) -> list[Watchdog]:
    store, found = dist.HashStore(), []
    for rank in ranks:
        pulse = Heartbeat(step=7)
        pulse.begin("world", "wait for rank 0")
        found.append(Watchdog(pulse, store, rank, size, limit_s, tmp_path))
        time.sleep(0.03)  # never in step with each other
    return found


def test_nobody_ends_while_rank_0_works_alone(tmp_path, ended):
    running = watches(tmp_path, [0, 1, 2, 3], 4, 0.2)
    with running[0].heartbeat.excuse():
        time.sleep(2.0)
    for watch in running:
        watch.stop()
    assert ended == []


def test_a_rank_that_never_spoke_ends_the_others(tmp_path, ended):
    running = watches(tmp_path, [0, 1, 2], 4, 0.2)
    time.sleep(1.0)
    for watch in running:
        watch.stop()
    assert len(ended) >= 3 and all("rank 3 has never sent a heartbeat" in line for line in ended)
    assert ended[0].startswith("step 7: wait for rank 0 over axis world waits for ")


def test_a_store_that_is_gone_ends_the_rank(tmp_path, ended):
    class Gone(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

    watch = Watchdog(Heartbeat(), Gone(), 0, 2, 0.2, tmp_path)
    time.sleep(0.8)
    watch.stop()
    assert ended and ended[0] == "step 0: the store of the job no longer answers"
