"""The next batches made ahead, on one thread: making them is copying out of mapped files, which waits for disks only.

The order is that of the steps, so nothing about it is state: a run that goes on elsewhere asks for its next step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Makes what `make(step)` returns for up to `depth` steps after the one that is asked for; 0: none.

    `make` runs on another thread than the caller's, one call at a time, in the order of the steps. An error in it is
    raised by `get` of the very step it belongs to.
    """

    def __init__(self, make: Callable[[int], T], depth: int) -> None:
        self.make, self.depth = make, depth
        self._ahead: deque[Future[T]] = deque()
        self._first = 0
        self._thread = ThreadPoolExecutor(1, "prefetch") if depth else None

    def get(self, step: int, stop: int) -> T:
        """What belongs to `step`; nothing is made ahead for `stop` and beyond, which cannot be made yet or never is."""
        if self._thread is None:
            return self.make(step)
        if step != self._first:  # the first call, or a jump
            self._forget()
        self._first = step + 1
        while len(self._ahead) <= self.depth and (not self._ahead or step + len(self._ahead) < stop):
            self._ahead.append(self._thread.submit(self.make, step + len(self._ahead)))
        return self._ahead.popleft().result()

    def close(self) -> None:
        """End the thread, after the batch that it is making. What is asked for later is made when it is asked for."""
        if self._thread is not None:
            self._forget()
            self._thread.shutdown()
            self._thread = None

    def _forget(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
