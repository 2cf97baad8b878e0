"""Hang detection: a thread on every rank that ends the process if a collective waits too long, with one report.

Each rank publishes a heartbeat and its progress in the store. If a rank has waited for the limit, one rank, the judge,
reads what all ranks have published, twice, and publishes its verdict; ranks that wait read the verdict and end. So a
hang costs a rank a few requests, and the judge a few large ones, however many ranks there are. The verdict names

- the ranks whose heartbeat no longer changes: they are dead or stopped; or else
- the ranks that have begun fewer collectives in a group in which another rank waits: they are late; or else
- the oldest incomplete collective, if every rank waits: all have begun the same and it does not complete.

Otherwise no rank ends. Clocks of machines are never compared.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from core.exit_codes import HUNG
from core.files import append_json_line
from parallel.comm.heartbeat import Heartbeat, Status

SILENT_S = 30.0
"""A rank is presumed dead if its heartbeat does not change for this time, or half the limit: long calls into other
code can hold the lock of its interpreter for seconds. The judge looks first so long before the limit.
"""
INTERVAL_S = 2.5
"""Seconds between heartbeats, or a tenth of the limit."""
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "4096", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Environment variables of torch. A record of 4,096 collectives covers several micro-batches in 1 MB or so."""
CHUNK = 4096
"""Number of statuses read with one request."""
_SEARCHES = 64
"""Requests spent on finding ranks that have never published a status."""
_VERDICT = "verdict"


class Watchdog:
    """A thread that runs until `stop`. It leaves its report in `logs` for the process that restarts the ranks."""

    def __init__(
        self, heartbeat: Heartbeat, store: dist.Store, rank: int, size: int, limit_s: float, logs: Path
    ) -> None:
        self.heartbeat, self.store, self.rank, self.size = heartbeat, store, rank, size
        self.limit_s, self.logs = limit_s, logs
        self.interval_s, self.silent_s = min(INTERVAL_S, limit_s / 10), min(SILENT_S, limit_s / 2)
        judges = list(dict.fromkeys((0, size - 1, size // 2)))
        self.turn = judges.index(rank) if rank in judges else None
        """How many judges must have failed before this rank judges. None: it never does."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and publish that this rank is done: other ranks must not report its missing heartbeats."""
        self._stopped.set()
        self._thread.join()
        with suppress(dist.DistError, RuntimeError):  # the store may be gone with the processes that started us
            self.store.set(_key(self.rank), json.dumps(self.heartbeat.status(0, done=True)))

    def _run(self) -> None:
        """Publish a heartbeat at every interval, also while suspecting others, else this rank seems dead."""
        beat, before, answered = 0, None, time.monotonic()
        while not self._stopped.is_set():
            beat += 1
            try:
                self.store.set(_key(self.rank), json.dumps(self.heartbeat.status(beat)))
                before = self._look(before)
                answered = time.monotonic()
            except (dist.DistError, RuntimeError):  # at the end of a run the store may close first
                if time.monotonic() - answered > self.limit_s:
                    self._end(f"step {self.heartbeat.step}: the store of the job no longer answers")
            self._stopped.wait(self.interval_s)

    def _look(self, before: _Look | None) -> _Look | None:
        """If this rank waits too long, end with the verdict of a judge, or be the judge."""
        since = self.heartbeat.oldest()[1]
        over_s = time.monotonic() - since - self.limit_s
        if over_s <= -self.silent_s - self.interval_s:
            return None
        if self.store.check([_VERDICT]):
            verdict = json.loads(self.store.get(_VERDICT))
            self._stopped.wait(2 * self.interval_s)  # the judge ends first: its report is the one that counts
            self._end(verdict["line"])
            return None
        if self.turn is None or (self.turn and over_s < 2 * self.turn * self.interval_s):
            return None
        if before is None or before[0] != since:
            return since, time.monotonic(), self._statuses()
        if time.monotonic() - before[1] < self.silent_s or over_s <= 0:
            return before
        found = judge(before[2], self._statuses(), self.size, self.limit_s - 2 * self.interval_s)
        if found is not None and since == self.heartbeat.oldest()[1]:
            line, hosts = found
            record = {"time": time.time(), "rank": self.rank, "line": line, "hosts": hosts}
            if json.loads(self.store.compare_set(_VERDICT, "", json.dumps(record))) == record:
                self._record(record)
                self._stopped.wait(self.interval_s)  # the store may end with this process
                self._end(line)
        return None

    def _statuses(self) -> dict[int, Status]:
        """Return what each rank has published. Ranks that have never published anything are missing."""
        present = _present(self.store, self.size)
        found: dict[int, Status] = {}
        for start in range(0, len(present), CHUNK):
            ranks = present[start : start + CHUNK]
            texts = self.store.multi_get([_key(rank) for rank in ranks])
            found.update((rank, json.loads(text)) for rank, text in zip(ranks, texts, strict=True))
        return found

    def _record(self, record: Mapping[str, object]) -> None:
        with suppress(OSError):
            self.logs.mkdir(parents=True, exist_ok=True)
            append_json_line(self.logs / "hangs.jsonl", record)

    def _end(self, line: str) -> None:
        print(f"leviathan: error: {line}", file=sys.stderr, flush=True)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            _dump_flight_recorder(self.logs / f"flight-rank-{self.rank:05d}.pickle")
        finally:
            os._exit(HUNG)  # the main thread is inside the collective and cannot be interrupted


_Look = tuple[float, float, dict[int, Status]]
"""The first look of a judge: since when it waited, when it looked, and what it saw."""


def judge(
    before: Mapping[int, Status], after: Mapping[int, Status], size: int, limit_s: float
) -> tuple[str, list[str]] | None:
    """Return why ranks wait longer than `limit_s`, and the hosts of the ranks they wait for, from two looks at all
    ranks' statuses. None if no rank waits, or if those that wait may still be answered.

    Silent ranks are reported first, whatever their group: a rank that waits for them makes other ranks wait in turn. Of
    late ranks, those with the fewest collectives over all groups are reported.
    """
    working = {rank: status for rank, status in after.items() if not status["done"]}
    silent = {rank: "has never sent a heartbeat" for rank in range(size) if rank not in after}
    for rank, status in working.items():
        if status["beat"] == before.get(rank, {}).get("beat"):
            silent[rank] = f"has sent no heartbeat since step {_last(status)}"
    idle = {rank: status for rank, status in working.items() if not status["excused"] and status["waits_s"] > limit_s}
    waiting = {rank: status for rank, status in idle.items() if rank not in silent}
    if not waiting:
        return None
    if silent:
        return _report(waiting, silent, after)
    most: dict[str, int] = {}
    for status in waiting.values():
        most[status["group"]] = max(most.get(status["group"], 0), status["begun"].get(status["group"], 0))
    late = {
        rank: sum(status["begun"].values())
        for rank, status in working.items()
        if not status["excused"] and any(status["begun"].get(group, count) < count for group, count in most.items())
    }
    least = min(late.values(), default=0)
    named = {rank: f"is alive but at step {_last(after[rank])}" for rank, count in late.items() if count == least}
    if named:
        others = {rank: status for rank, status in waiting.items() if rank not in late} or waiting
        return _report(others, named, after)
    if len(waiting) < len(working):
        return None  # a rank that works may still come
    first = max(waiting, key=lambda rank: (-waiting[rank]["step"], waiting[rank]["waits_s"], -rank))
    group = waiting[first]["group"]
    members = [rank for rank, status in waiting.items() if group in status["begun"]] or [first]
    shown = ", ".join(map(str, members[:4])) + (f" and {len(members) - 4} more" if len(members) > 4 else "")
    text = f"all {len(working)} ranks wait, and this one is incomplete for the longest time, on ranks {shown}: "
    return _waits(waiting[first]) + f"; {text}a link or a device may be broken", []


def _report(
    waiting: Mapping[int, Status], missing: Mapping[int, str], statuses: Mapping[int, Status]
) -> tuple[str, list[str]]:
    lines, more = [f"rank {rank} {why}" for rank, why in sorted(missing.items())], len(missing) - 4
    hosts = sorted({statuses[rank]["host"] for rank in missing if rank in statuses})
    longest = waiting[max(waiting, key=lambda rank: (waiting[rank]["waits_s"], -rank))]
    return f"{_waits(longest)}; " + ", ".join(lines[:4]) + (f" and {more} more" if more > 0 else ""), hosts


def _waits(status: Status) -> str:
    purpose, _, axis = status["what"].rpartition(" over ")
    return f"step {status['step']}: {purpose} over axis {axis} waits for {status['waits_s']:.0f} s"


def _last(status: Status) -> str:
    return f"{status['step']} (last: {status['what']}, on {status['host']})"


def _present(store: dist.Store, size: int) -> list[int]:
    """Return the ranks that have published a status. After `_SEARCHES` requests, ranks not yet found are left out."""
    present, parts, requests = list[int](), [range(size)], 0
    while parts:
        part, requests = parts.pop(), requests + 1
        if store.check([_key(rank) for rank in part]):
            present += part
        elif len(part) > 1 and requests < _SEARCHES:
            parts += [part[len(part) // 2 :], part[: len(part) // 2]]
    return sorted(present)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def keep_flight_record() -> None:
    """Let NCCL record the last collectives, and dump them if it ends a rank. Call it before the group is made."""
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)


def _dump_flight_recorder(path: Path) -> None:
    """Write NCCL's own record of the last collectives, if it keeps one (TORCH_FR_BUFFER_SIZE)."""
    if dist.is_nccl_available() and dist.is_initialized() and "nccl" in dist.get_backend():
        import torch._C._distributed_c10d as native

        path.write_bytes(native._dump_nccl_trace())  # type: ignore[attr-defined]
