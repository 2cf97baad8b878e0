"""Batches made ahead come in order, their errors too, and no thread is left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import DataError
from data.corpus import Corpus
from data.loader import Loader
from data.prefetch import Prefetcher
from tests.data.conftest import write_parquet
from tests.data.test_loader import SEQ_LEN, concat, equal


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
def test_batches_come_in_the_order_of_the_steps(depth: int) -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return 10 * step

    ahead = Prefetcher(make, depth)
    assert [ahead.get(step, 9) for step in range(3, 9)] == [10 * step for step in range(3, 9)]
    ahead.close()
    assert made == list(range(3, 9)), "each once, none beyond the end"


def test_at_most_depth_batches_are_made_ahead() -> None:
    made: list[int] = []
    ahead = Prefetcher(made.append, 2)
    ahead.get(0, 100)
    ahead.get(1, 100)
    ahead.close()
    assert made in ([0, 1], [0, 1, 2], [0, 1, 2, 3]), "what had not begun is not made"
    slow = Prefetcher(lambda step: time.sleep(0.05), 3)
    slow.get(0, 100)
    time.sleep(0.3)
    begin = time.perf_counter()
    for step in range(1, 4):
        slow.get(step, 100)
    assert time.perf_counter() - begin < 0.03
    slow.close()


def test_a_jump_restarts_and_close_ends_the_thread() -> None:
    before = threading.active_count()
    ahead = Prefetcher(lambda step: step, 3)
    assert [ahead.get(step, 50) for step in (0, 1, 20, 21, 5, 5, 6)] == [0, 1, 20, 21, 5, 5, 6]
    assert threading.active_count() == before + 1
    ahead.close()
    ahead.close()
    assert threading.active_count() == before
    assert ahead.get(7, 50) == 7, "after close it makes batches on demand"


def test_an_error_is_raised_at_its_own_step() -> None:
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


def test_a_loader_may_be_read_from_two_threads(corpus: Corpus) -> None:
    loader, other = (Loader(corpus, SEQ_LEN, 8, seed=1) for _ in range(2))
    ahead = Prefetcher(loader.batch, 3)
    for step in range(60):
        loader.batch(100_000 - 300 * step)
        assert equal(ahead.get(step, 60), other.batch(step))
    ahead.close()


def test_a_streamed_source_resumes_exactly_on_other_ranks(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    """A Hugging Face data set: one rank for three steps, then two ranks that open its tokens again."""
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet")
    sources = {"mine": {"kind": "huggingface", "path": str(tmp_path / "set")}}

    def batches(ranks: int, steps: range) -> list[list]:
        loaders = [Loader(make_corpus(sources), SEQ_LEN, 8, 1, "main") for _ in range(ranks)]
        share = 8 // ranks
        ahead = [
            Prefetcher(lambda step, rank=rank: loaders[rank].batch(step, rank * share, (rank + 1) * share), 2)
            for rank in range(ranks)
        ]
        found = [[one.get(step, steps.stop) for one in ahead] for step in steps]
        for one in ahead:
            one.close()
        return found

    whole = batches(1, range(8))
    resumed = batches(1, range(3)) + batches(2, range(3, 8))
    assert all(equal(a[0], concat(b)) for a, b in zip(whole, resumed, strict=True))
    assert [len(step) for step in resumed] == [1] * 3 + [2] * 5
    assert not equal(whole[3][0], concat(batches(2, range(4, 5))[0])), "control: another step is another batch"
