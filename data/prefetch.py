"""Prepare the next batches on one thread, which copies from memory-mapped files and waits only for disks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Call `make(step)` in advance for up to `depth` steps after the requested step. With depth 0, only when requested.

    `make` runs on another thread, one call at a time, in the order of the steps. `get` raises the error of its step.
    """

    def __init__(self, make: Callable[[int], T], depth: int) -> None:
        self.make, self.depth = make, depth
        self._ahead: deque[Future[T]] = deque()
        self._next = 0
        self._thread = ThreadPoolExecutor(1, "prefetch") if depth else None

    def get(self, step: int, stop: int) -> T:
        """Return `make(step)`. Nothing is made in advance for step `stop` and later steps."""
        if self._thread is None:
            return self.make(step)
        if step != self._next:  # the first call, or a jump
            self._cancel()
        self._next = step + 1
        while len(self._ahead) <= self.depth and (not self._ahead or step + len(self._ahead) < stop):
            self._ahead.append(self._thread.submit(self.make, step + len(self._ahead)))
        return self._ahead.popleft().result()

    def forget(self) -> None:
        """Drop what was made in advance, because `make` has changed."""
        self._cancel()

    def close(self) -> None:
        """End the thread after the batch that it is making. From then on `get` makes each batch itself."""
        if self._thread is not None:
            self._cancel()
            self._thread.shutdown()
            self._thread = None

    def _cancel(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
