"""Hang detection: a thread on every rank that reports why a collective waits too long, and ends the process.

Each rank publishes a heartbeat and its progress in the store. If this rank waits longer than the limit, it looks for
missing ranks. A rank whose heartbeat no longer changes is dead or stopped; a rank that has begun fewer collectives is
late. If no rank is missing, this rank does not end: it may be late itself. Clocks of machines are never compared.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.exit_codes import HUNG, host_name
from core.files import append_json_line

SILENT_BEATS = 3
"""A rank is presumed dead if its heartbeat does not change during this number of our own heartbeats."""

FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "4096", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Environment variables of torch. A record of 4,096 collectives covers several micro-batches in 1 MB or so."""

Status = dict[str, Any]
"""What a rank publishes: beat number, done, step, last collective, collectives begun by axis, excused, and host."""


@dataclass
class Heartbeat:
    """What this rank is doing. It is written when a collective begins, and read by the watchdog."""

    step: int = 0
    axis: str = "world"
    purpose: str = "start"
    group: dist.ProcessGroup | None = None
    since: float = field(default_factory=time.monotonic)
    begun: Counter[str] = field(default_factory=Counter)
    """Number of collectives begun, by axis."""
    excused: int = 0
    """Positive while this rank does long work alone that other ranks wait for. It does not count as late meanwhile."""

    def begin(self, axis: str, purpose: str, group: dist.ProcessGroup | None = None) -> None:
        self.wait(axis, purpose, group)
        self.begun[axis] += 1

    def wait(self, axis: str, purpose: str, group: dist.ProcessGroup | None = None) -> None:
        """Record a message between two ranks. `begun` omits messages: their number may differ between ranks."""
        self.axis, self.purpose, self.group, self.since = axis, purpose, group, time.monotonic()

    @contextmanager
    def excuse(self) -> Iterator[None]:
        self.excused += 1
        try:
            yield
        finally:
            self.excused -= 1
            self.since = time.monotonic()

    def status(self, beat: int, done: bool = False) -> Status:
        what, begun = f"{self.purpose} over {self.axis}", dict(self.begun)
        known = {"step": self.step, "what": what, "begun": begun, "excused": self.excused, "host": host_name()}
        return {"beat": beat, "done": done, **known}


class Watchdog:
    """A thread that runs until `stop`. It leaves its report in `logs` for the process that restarts the ranks."""

    def __init__(
        self, heartbeat: Heartbeat, store: dist.Store, rank: int, size: int, limit_s: float, logs: Path
    ) -> None:
        self.heartbeat, self.store, self.rank, self.size = heartbeat, store, rank, size
        self.limit_s, self.logs = limit_s, logs
        self.interval_s = min(10.0, limit_s / 5)
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
        """Publish a heartbeat at every interval, also while `_look` compares statuses, else this rank seems dead."""
        beat, suspicion, answered = 0, None, time.monotonic()
        while not self._stopped.is_set():
            beat += 1
            try:
                self.store.set(_key(self.rank), json.dumps(self.heartbeat.status(beat)))
                suspicion = self._look(beat, suspicion)
                answered = time.monotonic()
            except (dist.DistError, RuntimeError):  # at the end of a run the store may close first
                if time.monotonic() - answered > self.limit_s:
                    self._end(f"step {self.heartbeat.step}: the store of the job no longer answers", [])
            self._stopped.wait(self.interval_s)

    def _look(self, beat: int, suspicion: _Suspicion | None) -> _Suspicion | None:
        """If this rank waits too long, compare statuses over some beats, and end the process if a rank is missing."""
        heartbeat = self.heartbeat
        if time.monotonic() - heartbeat.since <= self.limit_s:
            return None
        if suspicion is None or suspicion.since != heartbeat.since:
            return _Suspicion(heartbeat.since, beat, self._statuses())
        if beat - suspicion.beat < SILENT_BEATS:
            return suspicion
        group = list(range(self.size)) if heartbeat.group is None else dist.get_process_group_ranks(heartbeat.group)
        report = find_missing(heartbeat, self.rank, self.size, group, suspicion.statuses, self._statuses())
        if report is not None and heartbeat.since == suspicion.since:
            waited = time.monotonic() - heartbeat.since
            line = f"step {heartbeat.step}: {heartbeat.purpose} over axis {heartbeat.axis} waits for {waited:.0f} s"
            self._end(f"{line}; {report[0]}", report[1])
        return None

    def _statuses(self) -> dict[int, Status]:
        present = [rank for rank in range(self.size) if self.store.check([_key(rank)])]
        return {rank: json.loads(self.store.get(_key(rank))) for rank in present}

    def _end(self, line: str, hosts: list[str]) -> None:
        print(f"leviathan: error: {line}", file=sys.stderr, flush=True)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            record = {"time": time.time(), "rank": self.rank, "line": line, "hosts": hosts}
            append_json_line(self.logs / "hangs.jsonl", record)
            _dump_flight_recorder(self.logs / f"flight-rank-{self.rank:05d}.pickle")
        finally:
            os._exit(HUNG)  # the main thread is inside the collective and cannot be interrupted


@dataclass(frozen=True)
class _Suspicion:
    since: float
    beat: int
    statuses: dict[int, Status]


def find_missing(
    heartbeat: Heartbeat, rank: int, size: int, group: list[int], before: dict[int, Status], after: dict[int, Status]
) -> tuple[str, list[str]] | None:
    """Describe the ranks that a waiting rank waits for. Returns the text and their hosts; None if no rank is missing.

    Ranks without a new heartbeat are missing, whatever their group: a rank that waits for them makes other ranks wait
    in turn. If every rank has one, the missing ranks are those of `group` that have begun fewer collectives on
    this rank's axis. Of these, only the ranks with the fewest collectives over all axes are reported.
    """
    missing = {other: "has never sent a heartbeat" for other in range(size) if other not in after}
    for other, status in after.items():
        if other != rank and not status["done"] and status["beat"] == before.get(other, {}).get("beat"):
            missing[other] = f"has sent no heartbeat since step {_last(status)}"
    if not missing:
        begun = {other: after[other]["begun"] for other in group if not after[other]["excused"]}
        late = [other for other in begun if begun[other].get(heartbeat.axis, 0) < heartbeat.begun[heartbeat.axis]]
        least = min((sum(begun[other].values()) for other in late), default=0)
        missing = {
            other: f"is alive but at step {_last(after[other])}"
            for other in late
            if sum(begun[other].values()) == least
        }
    if not missing:
        return None
    lines, more = [f"rank {other} {why}" for other, why in missing.items()], len(missing) - 4
    hosts = sorted({after[other]["host"] for other in missing if other in after})
    return ", ".join(lines[:4]) + (f" and {more} more" if more > 0 else ""), hosts


def _last(status: Status) -> str:
    return f"{status['step']} (last: {status['what']}, on {status['host']})"


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
