"""The deadlock lint passes ranks that agree, and catches planted bugs. Each rank is played in turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from parallel.checks.deadlock import deadlocks
from parallel.checks.order import late_gathers
from parallel.checks.recorder import Issued
from parallel.layout import ParallelConfig
from parallel.mesh import MeshAxis, Meshes
from tests.parallel.checks.fake_ranks import issued_by_all

GRID = ParallelConfig(tp=2)


def sums(*axes: MeshAxis) -> None:
    for axis in axes:
        axis.sum(torch.ones(3), "test")


def honest(meshes: Meshes) -> None:
    sums(meshes.tp, meshes.fsdp, meshes.world, meshes.tp)


def swapped(meshes: Meshes) -> None:
    """On one rank, take two groups in another order. In each group the sequences are equal: only a replay sees it."""
    first, second = (meshes.world, meshes.tp) if meshes.world.rank == 1 else (meshes.tp, meshes.world)
    sums(first, second)


def joined_by_some(meshes: Meshes) -> None:
    sums(meshes.tp, *([meshes.fsdp] if meshes.world.rank < 3 else []))


def another_shape(meshes: Meshes) -> None:
    meshes.tp.sum(torch.ones(3 + (meshes.world.rank == 2)), "test")


def another_operation(meshes: Meshes) -> None:
    operation = dist.ReduceOp.MAX if meshes.world.rank == 0 else dist.ReduceOp.SUM
    meshes.tp.reduce(torch.ones(3), "test", operation)


@pytest.mark.parametrize(
    "program, fault",
    [
        (honest, None),
        (swapped, "rank 1 waits in allreduce sum"),
        (joined_by_some, "rank 3 issues no more"),
        (another_shape, "rank 2 issues allreduce sum float32 [(4,)]"),
        (another_operation, "rank 0 issues allreduce max"),
    ],
)
def test_orders_of_collectives(program: Callable[[Meshes], None], fault):
    found = deadlocks(issued_by_all(4, GRID, program))
    assert (not found) if fault is None else any(fault in line for line in found), found


def pipe(forget: str | None = None) -> Callable[[Meshes], None]:
    """Send from each stage to the next. `forget`: what the last stage omits."""

    def program(meshes: Meshes) -> None:
        axis, x = meshes.pp, torch.ones(2, 3)
        if axis.rank > 0 and not (forget == "receive" and axis.rank == 2):
            dist.recv(x, group=axis.group, group_src=axis.rank - 1)
        if axis.rank < 2:
            dist.send(x[:1] if forget == "rows" and axis.rank == 1 else x, group=axis.group, group_dst=axis.rank + 1)

    return program


def exchange(batched: bool) -> Callable[[Meshes], None]:
    """Send to the other rank and receive from it: a deadlock, unless both start as one."""

    def program(meshes: Meshes) -> None:
        axis, x = meshes.pp, torch.ones(2)
        other = 1 - axis.rank
        if batched:
            ends = [(dist.isend, x), (dist.irecv, torch.empty(2))]
            operations = [dist.P2POp(kind, y, group=axis.group, group_peer=other) for kind, y in ends]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        else:
            dist.send(x, group=axis.group, group_dst=other)
            dist.recv(x, group=axis.group, group_src=other)

    return program


@pytest.mark.parametrize(
    "count, program, fault",
    [
        (3, pipe(), None),
        (3, pipe("receive"), "rank 1 issues send float32 [(2, 3)] to rank 2"),
        (3, pipe("rows"), "message 1: rank 1 issues send float32 [(1, 3)]"),
        (2, exchange(batched=True), None),
        (2, exchange(batched=False), "rank 0 waits in send"),
    ],
)
def test_sends_and_receives(count, program, fault):
    found = deadlocks(issued_by_all(count, ParallelConfig(pp=count), program))
    assert (not found) if fault is None else any(fault in line for line in found), found


def log(*labels: str) -> list[Issued]:
    return [Issued("synchronise") if label == "wait" else Issued("begin", label=f"FSDP::{label}") for label in labels]


GATHERS = ["all_gather (layers.2)", "all_gather (layers.2.ffn.experts)"]
USES = ["pre_forward (layers.2)", "all_gather_copy_out (layers.2)", "all_gather_copy_out (layers.2.ffn.experts)"]


def test_gathers_come_before_the_host_stops():
    early = log("pre_forward (layers.1)", *GATHERS, "wait", *USES, "wait", "pre_backward (layers.2)")
    assert late_gathers(early) == []
    one = "forward: layer 2 is gathered after layer 1 has stopped the host"
    experts = "forward: layer 2.ffn.experts is gathered after layer 1 has stopped the host"
    late = log("pre_forward (layers.1)", "wait", *GATHERS, *USES, "pre_backward (layers.2)")
    assert late_gathers(late) == [one, experts]
    between = log("pre_forward (layers.1)", GATHERS[0], "wait", GATHERS[1], *USES)
    assert late_gathers(between) == [experts]
    another_root = log("pre_forward (layers.1)", "wait", "root_pre_forward", *GATHERS, *USES)
    assert late_gathers(another_root) == [], "the vision encoder has layers of its own"
