"""Run the workers of a filter as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


class ThreadWorker:
    """A thread that takes part in a filter. The threads exchange values at a barrier."""

    def __init__(self, rank: int, values: list[Any], meet: threading.Barrier) -> None:
        self.rank, self.size, self.values, self.meet = rank, len(values), values, meet
        self.agreed: Any = None

    def all(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.meet.wait()
        found = list(self.values)
        self.meet.wait()
        return found

    def sum(self, values: Any) -> Any:
        return np.sum(self.all(np.array(values)), axis=0)  # a copy: the caller may write to its array again

    def agree(self, error: Any) -> None:
        for found in filter(None, self.all(error)):
            self.agreed = found
            raise found


def on_threads(count: int, work: Callable[[ThreadWorker], Any]) -> list[Any]:
    """Return the results of `work` on `count` threads. If threads failed, raise the error of one of them."""
    values, meet = [None] * count, threading.Barrier(count, timeout=60)

    def guarded(rank: int) -> Any:
        worker = ThreadWorker(rank, values, meet)
        try:
            return work(worker)
        except BaseException as error:
            if error is not worker.agreed:  # else all threads raise it, and some may not have left the barrier yet
                meet.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(count)]
    if errors := [error for future in futures if (error := future.exception())]:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))  # prefer the cause
    return [future.result() for future in futures]
