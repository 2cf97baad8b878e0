"""What this rank is doing: which collectives it has begun, which are complete, and since when nothing has completed."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from core.exit_codes import host_name

Status = dict[str, Any]
"""What a rank publishes: beat number, done, step, oldest incomplete collective and its group, seconds since the last
completion, collectives begun by group, excused, and host.
"""
WORLD = "world"
_DRAIN = 64
"""Number of incomplete collectives above which `begin` looks for complete ones itself."""


class Mark(Protocol):
    """A point in a device's queue, such as a CUDA event. `query` returns whether the device has passed it."""

    def query(self) -> bool: ...


class Operation(NamedTuple):
    step: int = 0
    axis: str = WORLD
    purpose: str = "start"
    group: str = WORLD
    """The name of the axis and the lowest rank of the group, which identify a group of ranks."""


@dataclass
class Heartbeat:
    """What this rank is doing. It is written when a collective begins, and read by the watchdog.

    A CPU has completed a collective when it begins the next one. A GPU's host runs ahead: `mark`, if given, returns a
    mark in the device's queue, and a collective is complete once the device has passed the mark set when the next one
    began. Without new marks passed, a rank counts as waiting however many collectives its host has begun since.
    """

    mark: Callable[[], Mark] | None = None
    step: int = 0
    begun: Counter[str] = field(default_factory=lambda: Counter({WORLD: 0}))
    """Number of collectives begun, by group."""
    excused: int = 0
    """Positive while this rank does long work alone that other ranks wait for. It does not count as late meanwhile."""
    _last: Operation = field(default_factory=Operation)
    _since: float = field(default_factory=time.monotonic)
    _incomplete: deque[tuple[Operation, Mark]] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def join(self, group: str) -> None:
        """Publish that this rank is in a group, so that it counts as late there before its first collective."""
        self.begun.setdefault(group, 0)

    def begin(self, axis: str, purpose: str, group: str = WORLD) -> None:
        self.wait(axis, purpose, group)
        self.begun[group] += 1

    def wait(self, axis: str, purpose: str, group: str = WORLD) -> None:
        """Record a message between two ranks. `begun` omits messages: their number may differ between ranks."""
        if self.mark is not None:
            self._incomplete.append((self._last, self.mark()))
            if len(self._incomplete) > _DRAIN:
                self._drain()
        if not self._incomplete:
            self._since = time.monotonic()
        self._last = Operation(self.step, axis, purpose, group)

    @contextmanager
    def excuse(self) -> Iterator[None]:
        self.excused += 1
        try:
            yield
        finally:
            self.excused -= 1
            self._since = time.monotonic()

    def oldest(self) -> tuple[Operation, float]:
        """Return the oldest incomplete collective, and the time (`time.monotonic`) since which nothing completed."""
        with self._lock:
            self._drain_locked()
            return self._incomplete[0][0] if self._incomplete else self._last, self._since

    def status(self, beat: int, done: bool = False) -> Status:
        operation, since = self.oldest()
        what = {"step": operation.step, "what": f"{operation.purpose} over {operation.axis}", "group": operation.group}
        waits = {"waits_s": time.monotonic() - since, "begun": dict(self.begun), "excused": self.excused}
        return {"beat": beat, "done": done, **what, **waits, "host": host_name()}

    def _drain(self) -> None:
        if self._lock.acquire(blocking=False):  # else the watchdog does it right now
            try:
                self._drain_locked()
            finally:
                self._lock.release()

    def _drain_locked(self) -> None:
        passed = False
        while self._incomplete and self._incomplete[0][1].query():
            self._incomplete.popleft()
            passed = True
        if passed:
            self._since = time.monotonic()


def marks(kind: str) -> Callable[[], Mark] | None:
    """Return how to mark the queue of a device of this kind. None for a CPU, which has no queue."""
    return _cuda_mark if kind == "cuda" else None


def _cuda_mark() -> Mark:
    event = torch.cuda.Event()
    event.record()
    return event
