"""Each rank makes few groups, by calls that all ranks make alike; none of them would hang under NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from bench.scale import __main__ as scale
from parallel.comm import tree
from parallel.comm.groups import ProcessGroups, _colour, split, split_calls
from parallel.comm.world import World
from parallel.layout import ParallelConfig
from parallel.mesh import make_meshes, splits

LAYOUTS = [
    ParallelConfig(pp=3, dp_replicate=2, tp=2, ep=2),
    ParallelConfig(pp=2, cp=2, tp=2, ep=4, dp_replicate=3),
    ParallelConfig(pp=4, tp=3, ep=6),
]
SIZE = 24
Call = tuple[str, tuple[tuple[int, ...], ...]]


@contextmanager
def recorded(rank: int, from_split: bool = True) -> Iterator[tuple[World, list[Call]]]:
    """Yield one of 24 ranks of a fake process group, and the calls that make its groups."""
    calls: list[Call] = []
    new_group = dist.new_group

    def splits_off(parent: Any, rows: list[list[int]], timeout: timedelta, group_desc: str | None) -> Any:
        calls.append(("split", tuple(map(tuple, rows))))
        own = next((row for row in rows if rank in row), None)
        return own and new_group(own, timeout, "fake", use_local_synchronization=True)

    def makes(ranks: list[int], *arguments: Any, **options: Any) -> Any:
        calls.append(("new", (tuple(ranks),)))
        return new_group(ranks, *arguments, **options)

    dist.init_process_group("fake", rank=rank, world_size=SIZE, store=dist.HashStore())
    try:
        with patch.object(dist, "split_group", splits_off), patch.object(dist, "new_group", makes):
            yield World(rank, SIZE, torch.device("cpu"), groups=ProcessGroups(from_split)), calls
    finally:
        dist.destroy_process_group()


def hangs_under_nccl(calls: list[list[Call]]) -> str:
    """Return why such calls of all ranks would hang if the world's communicator is split, or an empty text."""
    collective = [[rows for kind, rows in one if kind == "split"] for one in calls]
    if any(one != collective[0] for one in collective):
        return "not all ranks of the parent split it alike"
    if any(kind == "new" and len(rows[0]) > 1 for one in calls for kind, rows in one):
        return "new_group splits too, on some ranks only"
    return ""


def calls_of(layout: ParallelConfig, other: int = -1) -> list[list[Call]]:
    """Return the calls of every rank. The rank `other` makes its groups as if nothing had to be split."""
    found = []
    for rank in range(SIZE):
        with recorded(rank, rank != other) as (world, calls):
            meshes = make_meshes(layout.resolve(SIZE), world)
            for axis in meshes.joined:
                size, place = dist.get_world_size(axis.group), dist.get_rank(axis.group)
                assert (axis.size, axis.rank) == (size, place), axis.name
            found.append(list(calls))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_split_the_world_alike(layout):
    assert hangs_under_nccl(calls_of(layout)) == ""
    assert hangs_under_nccl(calls_of(layout, other=5)) == "not all ranks of the parent split it alike", "control"


def test_new_groups_of_some_ranks_are_found_to_hang():
    with (
        patch.object(World, "groups", ProcessGroups(from_split=False), create=True),
        recorded(3, False) as (world, calls),
    ):
        make_meshes(LAYOUTS[0].resolve(SIZE), world)
    assert hangs_under_nccl([calls]) == "new_group splits too, on some ranks only"


def test_equal_groups_are_shared():
    with recorded(0) as (world, calls):
        make_meshes(ParallelConfig(pp=2, tp=4, ep=4).resolve(SIZE), world)
        made = calls.copy()
        make_meshes(ParallelConfig(pp=2, tp=4, ep=4).resolve(SIZE), world)
    assert calls == made and len(made) == len(set(made)) + 1, "dp and fsdp overlap, so each has its own"
    axes = splits(ParallelConfig(pp=2, tp=4, ep=4).resolve(SIZE))
    assert axes["tp"] == axes["experts"] and axes["fsdp"] == axes["efsdp"] == axes["dp"] and axes["pp"] == axes["ends"]


def test_a_split_must_contain_each_rank_once():
    with recorded(0) as (world, _), pytest.raises(ValueError, match="must contain each of them once"):
        world.groups.of(split((2, 6), 1))
    assert split((2, 3), 0) == ((0, 3), (1, 4), (2, 5)) and split((2, 2, 2), 0, 2) == ((0, 1, 4, 5), (2, 3, 6, 7))


WORLDS = [(128, ParallelConfig(pp=4)), (16384, ParallelConfig(pp=16, tp=8, ep=64)), (SIZE, LAYOUTS[0])]


@pytest.mark.parametrize("size, layout", WORLDS)
def test_groups_of_one_call_have_different_colours(size, layout):
    for whole in splits(layout.resolve(size)).values():
        calls = split_calls(whole)
        assert sorted(tuple(row) for call in calls for row in call) == sorted(row for row in whole if len(row) > 1)
        assert all(len({_colour(row) for row in call}) == len(call) for call in calls) and len(calls) <= 2


def test_two_groups_of_a_split_may_have_one_colour():
    ends = splits(ParallelConfig(pp=4).resolve(128))["ends"]
    assert len({_colour(row) for row in ends}) == len(ends) - 1, "one call would join two of them"
    [first, second] = split_calls(ends)
    assert len(first) == len(ends) - 1 and len(second) == 1
    assert _colour([0]) == 0x9E3779B9 - 0x7FFFFFFF, "by hand"


def test_the_tree_reaches_every_rank_over_few_connections():
    for size in (1, 2, 7, 64, 1500):
        below = {rank: tree.children(rank, size) for rank in range(size)}
        assert sorted(child for some in below.values() for child in some) == list(range(1, size))
        assert all(tree.parent(child) == rank for rank, some in below.items() for child in some)
        assert max(len(some) for some in below.values()) <= 15


def test_the_bench_of_scale_holds_its_limits(monkeypatch):
    monkeypatch.setattr(scale, "TENSORS", 50)
    monkeypatch.setattr(scale, "LIMIT_S", 0.5)
    found = scale.measure({128: ParallelConfig(pp=2, tp=2, ep=32)}, (64,))
    assert found["communicators"][128] <= 64 and found["setup_s"][128] < 10
    assert found["store_requests_start"][128] <= 200 and found["store_requests_hang"][128] <= 200
    assert found["checkpoint_plan_s"][64] < 5 and found["checkpoint_replan_s"][64] < 5
