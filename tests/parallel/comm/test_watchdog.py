"""Why ranks wait: silent ranks before late ones, then a collective that completes nowhere; nothing while ranks work."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from parallel.comm.heartbeat import Heartbeat, Status
from parallel.comm.watchdog import Watchdog, judge

LIMIT_S = 10.0


def status(beat: int, waits_s: float = 12.0, step: int = 7, host: str = "a", **more: Any) -> Status:
    """Return what a rank publishes that waits in its third collective with the other rank of its group."""
    usual = {"done": False, "what": "tokens over ep", "group": "ep@0", "begun": {"world": 4, "ep@0": 3}, "excused": 0}
    return {"beat": beat, "waits_s": waits_s, "step": step, "host": host, **usual, **more}


OTHERS = {"group": "ep@2", "begun": {"world": 4, "ep@2": 1}}
NOW = {0: status(2), 1: status(6), 2: status(6, **OTHERS), 3: status(6, **OTHERS)}
WORKS = status(6, 1.0, **OTHERS)


def reported(**changed: Any) -> tuple[str, list[str]] | None:
    """Return the verdict if ranks 0 and 1, and 2 and 3, wait for each other, with other statuses of some ranks."""
    before = {rank: status(1 if rank == 0 else 5) for rank in range(4)}
    after = {**NOW, **{int(name[1:]): value for name, value in changed.items()}}
    return judge(before, {rank: value for rank, value in after.items() if value}, 4, LIMIT_S)


def test_no_rank_is_reported_while_another_works():
    assert reported(r3=WORKS) is None, "rank 3 may still come, and is in another group"
    assert reported(r3=status(6, 12.0, excused=1, **OTHERS)) is None, "it has announced long work"
    waits = {f"r{rank}": {**one, "waits_s": 1.0} for rank, one in NOW.items()}
    assert reported(**waits) is None, "nobody has waited for the limit"


def test_a_rank_behind_in_its_group_is_reported():
    behind = status(6, 1.0, 6, "b", begun={"world": 4, "ep@0": 2})
    line, hosts = reported(r1=behind, r3=WORKS)
    assert line.endswith("waits for 12 s; rank 1 is alive but at step 6 (last: tokens over ep, on b)")
    assert line.startswith("step 7: tokens over axis ep ") and hosts == ["b"]
    assert reported(r1={**behind, "excused": 1}) is None, "it has announced long work"


def test_a_silent_rank_comes_first_even_of_another_group():
    late = status(6, begun={"world": 4, "ep@0": 2})
    line, hosts = reported(r1=late, r3=status(5, step=4, host="c"))
    assert line.endswith("; rank 3 has sent no heartbeat since step 4 (last: tokens over ep, on c)") and hosts == ["c"]
    assert reported(r3=None)[0].endswith("; rank 3 has never sent a heartbeat")
    assert "rank 3" not in reported(r3=status(5, done=True))[0], "a finished rank may be silent"


def test_a_collective_that_completes_nowhere_is_reported():
    line, hosts = reported(r1=status(6, 13.0, 6))
    assert line.startswith("step 6: tokens over axis ep waits for 13 s; all 4 ranks wait") and hosts == []
    assert "on ranks 0, 1: " in line


class Mark:
    """A point in the queue of a device that passes it when it is told to."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        return self.passed


def test_a_host_that_runs_ahead_still_waits_for_its_device(monkeypatch):
    clock, marks = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def mark() -> Mark:
        marks.append(Mark())
        return marks[-1]

    ahead, behind = Heartbeat(mark, step=3), Heartbeat(None, step=3)
    for heartbeat in (ahead, behind):
        clock[0] = 100.0
        for purpose in ("weights", "tokens", "norm"):
            clock[0] += 10
            heartbeat.begin("fsdp", purpose, "fsdp@0")
    marks[0].passed = True  # what came before the first collective
    assert ahead.oldest()[0].purpose == "weights" and ahead.status(1)["begun"]["fsdp@0"] == 3
    clock[0] += 100
    assert (ahead.status(1)["waits_s"], behind.status(1)["waits_s"]) == (100, 100)
    ahead.begin("fsdp", "more", "fsdp@0")
    behind.begin("fsdp", "more", "fsdp@0")
    assert (ahead.status(1)["waits_s"], behind.status(1)["waits_s"]) == (100, 0), "a CPU has completed all before"
    marks[1].passed = True
    assert ahead.oldest() == (ahead.oldest()[0], clock[0]) and ahead.oldest()[0].purpose == "tokens"


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """Return the lines with which watchdogs would have ended their ranks; do not end the process."""
    lines: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, line: lines.append(f"{self.rank}: {line}"))
    return lines


def watched(tmp_path, ended: list[str], ranks: list[int], size: int, excused: bool, seconds: float = 20.0) -> set[str]:
    """Run watchdogs with a limit of 0.6 s until all have ended their ranks, or for `seconds`, while rank 0 may have
    announced long work. Returns the ranks that ended.
    """
    store, running = dist.HashStore(), []
    for rank in ranks:
        heartbeat = Heartbeat(step=7)
        heartbeat.begin("world", "wait for rank 0")
        running.append(Watchdog(heartbeat, store, rank, size, 0.6, tmp_path))
    running[0].heartbeat.excused += excused
    deadline = time.monotonic() + seconds
    while len({line[0] for line in ended}) < len(ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    for one in running:
        one.stop()
    return {line[0] for line in ended}


def test_no_rank_ends_while_rank_0_works_alone(tmp_path, ended):
    assert watched(tmp_path, ended, [0, 1, 2, 3], 4, True, seconds=1.2) == set()


def test_a_rank_without_a_heartbeat_ends_the_others(tmp_path, ended):
    assert watched(tmp_path, ended, [0, 1, 2], 4, True) == {"0", "1", "2"}
    assert all("rank 3 has never sent a heartbeat" in line for line in ended)
    assert ended[0].startswith("0: step 7: wait for rank 0 over axis world waits for ")
    assert len((tmp_path / "hangs.jsonl").read_text().splitlines()) == 1, "one report"


def test_another_rank_judges_if_rank_0_is_silent(tmp_path, ended):
    assert watched(tmp_path, ended, [1, 2, 3], 4, False) == {"1", "2", "3"} and "rank 0 has never sent" in ended[0]


def test_ranks_that_all_wait_end_together(tmp_path, ended):
    assert watched(tmp_path, ended, [0, 1, 2, 3], 4, False) == {"0", "1", "2", "3"}
    assert "all 4 ranks wait" in ended[0]


def test_a_store_that_is_gone_ends_the_rank(tmp_path, ended):
    class Gone(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

    one = Watchdog(Heartbeat(), Gone(), 0, 2, 0.2, tmp_path)
    time.sleep(0.4)
    one.stop()
    assert ended and ended[0] == "0: step 0: the store of the job no longer answers"
