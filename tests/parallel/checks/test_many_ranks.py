"""Layouts of more ranks than this machine could run: each of 16 ranks takes two steps in turn, and sends nothing.

A group that sends nothing gives a rank back what it hands in, so routing is balanced, which makes counts plausible.
Pipelines are omitted: the shapes that a stage receives would be arbitrary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench.layouts import deep
from parallel.checks.deadlock import deadlocks
from parallel.checks.order import late_gathers
from parallel.layout import ParallelConfig, Recompute
from parallel.mesh import Meshes
from parallel.parallelize import build
from precision.config import Compute, PrecisionConfig
from tests.parallel.checks.fake_ranks import issued_by_all
from tests.support.tiny import synthetic
from train.optim.config import OptimizerConfig

RANKS, ODD = 16, 9
LAYOUTS = {
    "hsdp, tp, cp, ep": ParallelConfig(dp_replicate=2, tp=2, cp=2, ep=4),
    "ep and etp by node": ParallelConfig(tp=2, ep=4, etp=2, exchange_node_size=4, recompute=Recompute.full),
}


def steps(swaps: bool) -> Callable[[Meshes], None]:
    """Return a program of two steps, between which ranks sum over tp and the world. With `swaps`, rank 9 sums over the
    world first.
    """
    model = deep(2)
    model = replace(model, router=replace(model.router, force_balanced=True))

    def program(meshes: Meshes) -> None:
        placed = build(model, PrecisionConfig(Compute.bfloat16), meshes, torch.device("cpu"), 0)
        _, _, step = synthetic(placed, OptimizerConfig(), 1)
        step()
        axes = (meshes.tp, meshes.world)
        for axis in reversed(axes) if swaps and meshes.world.rank == ODD else axes:
            axis.sum(torch.ones(3), "test")
        step()

    return program


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_sixteen_ranks_agree_on_the_order(name):
    issued = issued_by_all(RANKS, LAYOUTS[name], steps(swaps=False))
    groups = {one.ranks for one in issued[ODD] if one.is_collective}
    assert len(issued[0]) > 500 and len(groups) >= 4
    assert deadlocks(issued) == [] and not any(map(late_gathers, issued))
    swapped = issued_by_all(RANKS, LAYOUTS[name], steps(swaps=True), only=ODD)
    found = deadlocks([*issued[:ODD], *swapped, *issued[ODD + 1 :]])
    assert any("rank 9 waits in allreduce sum float32 [(3,)] of ranks 0, 1, 2" in line for line in found), found
