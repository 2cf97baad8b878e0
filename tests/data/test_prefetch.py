"""Prefetched batches and their errors come in the order of the steps, and no thread is left running."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from core.errors import DataError
from data.loader import Loader
from data.prefetch import Prefetcher
from tests.data.test_loader import SEQ_LEN, equal


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
def test_batches_come_in_the_order_of_the_steps(depth):
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return 10 * step

    ahead = Prefetcher(make, depth)
    assert [ahead.get(step, 9) for step in range(3, 9)] == [10 * step for step in range(3, 9)]
    ahead.close()
    assert made == list(range(3, 9)), "each once, none beyond the end"


def test_depth_batches_are_made_ahead():
    made: SimpleQueue[int] = SimpleQueue()
    ahead = Prefetcher(made.put, 2)
    ahead.get(0, 100)
    assert [made.get(timeout=60) for _ in range(3)] == [0, 1, 2]
    ahead.close()
    assert made.empty()


def test_a_jump_restarts_and_close_ends_the_thread():
    before = threading.active_count()
    ahead = Prefetcher(lambda step: step, 3)
    assert [ahead.get(step, 50) for step in (0, 1, 20, 21, 5, 5, 6)] == [0, 1, 20, 21, 5, 5, 6]
    assert threading.active_count() == before + 1
    ahead.close()
    ahead.close()
    assert threading.active_count() == before
    assert ahead.get(7, 50) == 7, "after close it makes batches on demand"


def test_an_error_is_raised_at_its_own_step():
    def make(step: int) -> int:
        if step == 2:
            raise DataError("shard 2 is gone")
        return step

    ahead = Prefetcher(make, 4)
    assert [ahead.get(step, 9) for step in range(2)] == [0, 1]
    with pytest.raises(DataError, match="shard 2"):
        ahead.get(2, 9)
    assert ahead.get(3, 9) == 3
    ahead.close()


def test_a_loader_may_be_read_from_two_threads(corpus):
    loader, other = (Loader(corpus, SEQ_LEN, 8, seed=1) for _ in range(2))
    ahead = Prefetcher(loader.batch, 3)
    for step in range(60):
        loader.batch(100_000 - 300 * step)
        assert equal(ahead.get(step, 60), other.batch(step))
    ahead.close()
