"""Test the plans for gathering matrices, for all ranks of a layout at once, without a process group."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from bench.layouts import tiny
from model.config import ModelConfig
from model.roles import ParameterInfo, registry
from parallel.layout import Layout, ParallelConfig
from parallel.mesh import Meshes, meshes_of_rank
from parallel.parallelize import on_meta
from parallel.sharding import ShardSpec, shard_specs
from parallel.whole_matrices import Round, rounds
from precision.config import PrecisionConfig

LAYOUTS = {
    "one": (1, ParallelConfig()),
    "fsdp3": (3, ParallelConfig()),
    "fsdp4": (4, ParallelConfig()),
    "tp2-fsdp3": (6, ParallelConfig(tp=2)),
    "ep2-efsdp3": (6, ParallelConfig(ep=2)),
    "etp2-efsdp3": (6, ParallelConfig(etp=2)),
    "hsdp": (4, ParallelConfig(dp_replicate=2)),
    "tp2-fsdp2": (4, ParallelConfig(tp=2)),
    "ep2-etp2-fsdp4": (4, ParallelConfig(ep=2, etp=2)),
    "etp2-efsdp4": (8, ParallelConfig(etp=2)),
    "all": (16, ParallelConfig(dp_replicate=2, tp=2, ep=2, etp=2)),
}
SIZES = [1, 1000, 1 << 26]
"""Limits on the number of elements that a rank gathers at a time: enough for one matrix, several, or all."""


@cache
def awkward() -> ModelConfig:
    """Return a model whose sizes are not divisible by the number of ranks. One of three ranks has no expert."""
    sizes = {"hidden_size": 40, "dense_hidden_size": 50, "expert_hidden_size": 80, "shared_expert_hidden_size": 18}
    return replace(tiny(2), **sizes, num_experts=4, head_dim=6)


@cache
def matrices() -> dict[str, ParameterInfo]:
    infos = registry(on_meta(awkward(), PrecisionConfig()))
    return {name: info for name, info in infos.items() if info.role.is_matrix}


def plans(layout: Layout, at_once: int) -> list[tuple[Meshes, dict[str, ShardSpec], list[Round]]]:
    """Return the meshes, shard specs and plan of every rank."""
    found = []
    for rank in range(layout.world_size):
        meshes = meshes_of_rank(layout, rank)
        specs = shard_specs(matrices(), awkward(), meshes)
        found.append((meshes, specs, rounds(specs, meshes, at_once)))
    return found


def done_here(together: Round) -> int:
    """Return the number of matrices that this rank updates in a round."""
    if not together.stages:
        return sum(piece.stop - piece.start for piece in together.ranges)
    return together.stages[-1].counts[together.stages[-1].split.rank]


@pytest.mark.parametrize("at_once", SIZES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_replica_does_every_matrix_once_and_groups_agree(name, at_once):
    """All ranks of a group plan the same exchanges, of the same sizes, in the same order."""
    count, config = LAYOUTS[name]
    done, wanted = Counter[object](), Counter[object]()
    groups: dict[tuple[object, ...], list[list[object]]] = {}
    for meshes, _, plan in plans(config.resolve(count), at_once):
        exchanges: dict[str, list[object]] = {}
        for together in plan:
            done[meshes.replicate.rank, together.shape] += done_here(together)
            assert done_here(together) <= max(1, at_once // math.prod(together.shape)), "the limit of memory"
            for stage in together.stages:
                said = (together.shape, stage.counts, stage.split.lengths)
                exchanges.setdefault(stage.split.name, []).append(said)
        places = {"fsdp": meshes.tp.rank, "tp": meshes.fsdp.rank}
        places |= {"efsdp": meshes.experts.rank, "etp": (meshes.efsdp.rank, meshes.ep.rank)}
        for axis, listed in exchanges.items():
            groups.setdefault((axis, meshes.replicate.rank, places[axis]), []).append(listed)
        # ranks with different experts send each other nothing, but take part in every all-to-all over `experts`
        calls = [together.stages for together in plan if any(s.split.axis.name == "experts" for s in together.stages)]
        groups.setdefault(("calls", meshes.replicate.rank, meshes.efsdp.rank), []).append([len(calls)])
    assert all(listed == ranks[0] for ranks in groups.values() for listed in ranks)
    for replica, info in itertools.product(range(config.dp_replicate), matrices().values()):
        wanted[replica, tuple(info.shape[-2:])] += math.prod(info.shape[:-2])
    assert done == wanted


@pytest.mark.parametrize("name", ["fsdp3", "fsdp4", "tp2-fsdp2", "all"])
def test_work_is_spread_evenly(name):
    """The work of any two ranks differs by at most that of two of the largest dense matrices."""
    count, config = LAYOUTS[name]
    work: Counter[int] = Counter()
    heaviest = 0
    for rank, (meshes, _, plan) in enumerate(plans(config.resolve(count), 1 << 26)):
        for together in plan:
            if any(stage.split.name in ("fsdp", "tp") for stage in together.stages) and meshes.replicate.rank == 0:
                cost = math.prod(together.shape) * min(together.shape)
                heaviest = max(heaviest, cost)
                work[rank] += cost * done_here(together)
    assert max(work.values()) - min(work.values()) <= 2 * heaviest, work


def test_experts_whole_where_they_lie_are_not_sent():
    for layout in (ParallelConfig(ep=2).resolve(2), ParallelConfig(ep=2).resolve(4), ParallelConfig().resolve(2)):
        for _, specs, plan in plans(layout, 1 << 26):
            stages = {piece.name: together.stages for together in plan for piece in together.ranges}
            experts = {name: stages[name] for name in specs if specs[name].info.role.is_expert}
            assert experts and not any(experts.values())
