"""The pool of ranks: results are in rank order, errors are relayed, hangs are killed, and cases are independent."""

from __future__ import annotations

import time
from contextlib import closing

import pytest
import torch
import torch.distributed as dist

from launch.rank_pool import Hang, Pool, RankError


def rank_and_sum(offset: int) -> tuple[int, int]:
    value = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(value)
    return dist.get_rank(), int(value)


def fail_on(fails: int | None, hangs: int | None = None) -> None:
    """Raise on rank `fails`, sleep on rank `hangs`, and wait for them on the other ranks."""
    if dist.get_rank() == fails:
        raise ValueError(f"planted on {fails}")
    if dist.get_rank() == hangs:
        time.sleep(3600)
    dist.all_reduce(torch.zeros(1))


def test_results_come_back_by_rank(ranks):
    assert ranks(3, rank_and_sum, 10) == [(0, 33), (1, 33), (2, 33)]
    assert ranks(1, dist.is_initialized) == [False], "one rank has no process group"


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_cause_is_raised_and_the_next_case_is_clean(ranks, rank):
    with pytest.raises(RankError, match=f"rank {rank} of 2 raised ValueError(.|\n)*planted on {rank}"):
        ranks(2, fail_on, rank, timeout_s=10)
    assert ranks(2, rank_and_sum, 0) == [(0, 1), (1, 1)]


@pytest.mark.slow
def test_a_hang_is_killed_and_the_pool_restarts():
    with closing(Pool()) as pool:
        with pytest.raises(Hang, match=r"ranks \[1\] of 2 did not answer within 2 s"):
            pool(2, fail_on, None, 1, timeout_s=2)
        with pytest.raises(RankError, match="planted on 1"):
            pool(2, fail_on, 1, 0, timeout_s=60)
        assert pool(2, rank_and_sum, 0) == [(0, 1), (1, 1)]
