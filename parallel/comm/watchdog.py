"""Who is missing: a thread on every rank that finds out why a collective waits too long, says so, and ends the rank.

Each rank tells the others through the store that it lives and how far it is. Where this rank waits for longer than the
limit, a rank whose word does not change any more is dead or stopped; one that has begun fewer collectives is late.
Clocks of different machines are never compared. A rank that waits with nobody missing does not end: it may be the late
one itself.
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

BEATS_OF_SILENCE = 3
"""A rank whose word stays the same for so many of ours is silent."""


@dataclass
class Heartbeat:
    """What this rank does: written where it begins a collective, read by its watch."""

    step: int = 0
    axis: str = "world"
    purpose: str = "start"
    group: dist.ProcessGroup | None = None
    since: float = field(default_factory=time.monotonic)
    begun: Counter[str] = field(default_factory=Counter)
    """Collectives begun, by axis."""
    excused: int = 0
    """Positive while this rank does something long by itself that others wait for: it is not late then."""

    def begin(self, axis: str, purpose: str, group: dist.ProcessGroup | None = None) -> None:
        self.axis, self.purpose, self.group, self.since = axis, purpose, group, time.monotonic()
        self.begun[axis] += 1

    def wait(self, axis: str, purpose: str, group: dist.ProcessGroup | None = None) -> None:
        """As `begin`, where ranks speak to each other in pairs: how often each does says nothing of who is late."""
        self.axis, self.purpose, self.group, self.since = axis, purpose, group, time.monotonic()

    @contextmanager
    def excuse(self) -> Iterator[None]:
        self.excused += 1
        try:
            yield
        finally:
            self.excused -= 1
            self.since = time.monotonic()

    def word(self, beat: int) -> dict[str, Any]:
        what = f"{self.purpose} over {self.axis}"
        return {
            "beat": beat,
            "step": self.step,
            "what": what,
            "begun": dict(self.begun),
            "excused": self.excused,
            "done": False,
            "host": host_name(),
        }


class Watchdog:
    """Runs until `stop`. `logs`: where a report is left for whoever starts the ranks again."""

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
        """This rank is done and will be silent."""
        self._stopped.set()
        self._thread.join()
        with suppress(dist.DistError, RuntimeError):  # the store may have gone with those who started us
            self.store.set(_key(self.rank), json.dumps({**self.heartbeat.word(0), "done": True}))

    def _run(self) -> None:
        """Beats without a pause: a rank that looks at the others must not seem dead to them meanwhile."""
        beat, suspicion, answered = 0, None, time.monotonic()
        while not self._stopped.is_set():
            beat += 1
            try:
                self.store.set(_key(self.rank), json.dumps(self.heartbeat.word(beat)))
                suspicion = self._look(beat, suspicion)
                answered = time.monotonic()
            except (dist.DistError, RuntimeError):  # at the end of a run the store goes before we do
                if time.monotonic() - answered > self.limit_s:
                    self._end(f"step {self.heartbeat.step}: the store of the job does not answer any more", [])
            self._stopped.wait(self.interval_s)

    def _look(self, beat: int, suspicion: _Suspicion | None) -> _Suspicion | None:
        """Compare the others' words over some beats while this rank waits too long; ends it where one is missing."""
        heartbeat = self.heartbeat
        if time.monotonic() - heartbeat.since <= self.limit_s:
            return None
        if suspicion is None or suspicion.since != heartbeat.since:
            return _Suspicion(heartbeat.since, beat, self._words())
        if beat - suspicion.beat < BEATS_OF_SILENCE:
            return suspicion
        group = list(range(self.size)) if heartbeat.group is None else dist.get_process_group_ranks(heartbeat.group)
        report = find_missing(heartbeat, self.rank, self.size, group, suspicion.words, self._words())
        if report is not None and heartbeat.since == suspicion.since:
            waited = time.monotonic() - heartbeat.since
            line = f"step {heartbeat.step}: {heartbeat.purpose} over axis {heartbeat.axis} waits for {waited:.0f} s"
            self._end(f"{line}; {report[0]}", report[1])
        return None

    def _words(self) -> dict[int, dict[str, Any]]:
        present = [rank for rank in range(self.size) if self.store.check([_key(rank)])]
        return {rank: json.loads(self.store.get(_key(rank))) for rank in present}

    def _end(self, line: str, hosts: list[str]) -> None:
        print(f"leviathan: error: {line}", file=sys.stderr, flush=True)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            word = {"time": time.time(), "rank": self.rank, "line": line, "hosts": hosts}
            append_json_line(self.logs / "hangs.jsonl", word)
            _dump_flight_recorder(self.logs / f"flight-rank-{self.rank:05d}.pickle")
        finally:
            os._exit(HUNG)  # the main thread is inside the collective and hears nothing


@dataclass(frozen=True)
class _Suspicion:
    since: float
    beat: int
    words: dict[int, dict[str, Any]]


def find_missing(
    heartbeat: Heartbeat,
    rank: int,
    size: int,
    group: list[int],
    before: dict[int, dict[str, Any]],
    after: dict[int, dict[str, Any]],
) -> tuple[str, list[str]] | None:
    """Whom a waiting rank waits for, in words, and their hosts; None where nobody is missing.

    Ranks without a sign of life come first, wherever they are: whoever waits for them makes others wait. Else those of
    the group that have begun fewer collectives of this axis, and of them those that are furthest behind.
    """
    never = [other for other in range(size) if other not in after]
    silent = [
        other
        for other, word in after.items()
        if other != rank and not word["done"] and word["beat"] == before.get(other, {}).get("beat")
    ]
    if never or silent:
        told = [f"rank {other} has never given a sign of life" for other in never]
        told += [f"rank {o} gives no sign of life since step {after[o]['step']} ({_where(after[o])})" for o in silent]
        return _listed(told), sorted({after[other]["host"] for other in silent})
    begun = {other: after[other]["begun"] for other in group if not after[other]["excused"]}
    late = [other for other in begun if begun[other].get(heartbeat.axis, 0) < heartbeat.begun[heartbeat.axis]]
    if not late:
        return None
    least = min(sum(begun[other].values()) for other in late)
    late = [other for other in late if sum(begun[other].values()) == least]
    told = [f"rank {other} lives but is at step {after[other]['step']} ({_where(after[other])})" for other in late]
    return _listed(told), sorted({after[other]["host"] for other in late})


def _where(word: dict[str, Any]) -> str:
    return f"last: {word['what']}, on {word['host']}"


def _listed(told: list[str], most: int = 4) -> str:
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


def _dump_flight_recorder(path: Path) -> None:
    """NCCL's own record of the last collectives, where it keeps one (TORCH_FR_BUFFER_SIZE)."""
    if dist.is_nccl_available() and dist.is_initialized() and "nccl" in dist.get_backend():
        import torch._C._distributed_c10d as native

        path.write_bytes(native._dump_nccl_trace())  # type: ignore[attr-defined]
