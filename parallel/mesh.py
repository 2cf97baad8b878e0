"""The process groups of a layout, by name.

Invariant: the dense axes pp * dp_replicate * dp_shard * cp * tp and the sparse axes pp * dp_replicate * efsdp * ep *
etp arrange the same ranks. An axis further right varies faster from rank to rank. Every axis splits
the whole world, and all processes create the groups of the axes in the same order: see `parallel.comm.groups`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.comm.groups import Split, split
from parallel.comm.heartbeat import WORLD, Heartbeat
from parallel.comm.world import World
from parallel.layout import Layout

WEIGHTS = "weights"
"""The lane of FSDP2's groups: it gathers weights and reduces gradients beside the collectives of layers."""


@dataclass
class Traffic:
    """Bytes that this rank has handed to collectives, by (axis, purpose)."""

    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    def take(self) -> dict[tuple[str, str], int]:
        """Return what was counted since the last call, and start again from zero."""
        taken, self.bytes = dict(self.bytes), Counter()
        return taken


@dataclass(frozen=True)
class MeshAxis:
    """The ranks whose positions in a layout differ from this rank's along one axis only. `rank`: its index in them."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    key: str = WORLD
    """Identifies the group among all ranks' heartbeats."""
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    def sum(self, tensor: Tensor, purpose: str) -> None:
        self.reduce(tensor, purpose, dist.ReduceOp.SUM)

    def reduce(self, tensor: Tensor, purpose: str, operation: dist.ReduceOp.RedOpType) -> None:
        """Reduce over these ranks, in place."""
        if self.size > 1:
            self.count(purpose, tensor)
            dist.all_reduce(tensor, op=operation, group=self.group)

    def count(self, purpose: str, tensor: Tensor) -> None:
        """Record that a collective begins here and is handed `tensor`."""
        self.note(purpose, tensor.numel() * tensor.element_size())  # torch.compile cannot trace `nbytes`

    def note(self, purpose: str, size: int) -> None:
        """Record that a collective issued by other code begins and is handed `size` bytes."""
        self.traffic.heartbeat.begin(self.name, purpose, self.key)
        self.add_bytes(purpose, size)

    def send(self, purpose: str, tensor: Tensor) -> None:
        """Record that this rank sends a tensor to one other rank. The number of sends may differ between ranks."""
        self.wait(purpose)
        self.add_bytes(purpose, tensor.nbytes)

    def wait(self, purpose: str) -> None:
        self.traffic.heartbeat.wait(self.name, purpose, self.key)

    def add_bytes(self, purpose: str, size: int) -> None:
        self.traffic.bytes[self.name, purpose] += size


@dataclass(frozen=True)
class Meshes:
    """This rank's position in its layout.

    `pp`: the ranks that hold other layers of the same model. `ends`: the first and the last of them, which both hold a
    tied embedding; its size is 1 on other ranks. `dp`: the ranks that get different sequences of a batch. `cp`: the
    ranks that hold other parts of the same sequences. `cp_tp`: the cp * tp ranks that hold parts of the same sequences,
    tp varying faster; its size is 1 unless both cp and tp exceed 1. `pipeline`: the pp * cp * tp ranks that get the
    same sequences, pp varying slowest; its size is 1 unless all of them encode tiles. `stage`: the ranks with the same
    layers in a pipeline; its size is 1 unless they share tiles. `experts`: the ep * etp ranks over which routed experts
    are split, etp varying faster. `ep` and `etp` are positions in `experts` without groups. `dense` and `sparse`: the
    meshes over which FSDP2 shards parameters, (fsdp) or (dp_replicate, fsdp); None in a world of one rank.
    """

    layout: Layout
    world: MeshAxis
    pp: MeshAxis
    ends: MeshAxis
    dp: MeshAxis
    cp: MeshAxis
    cp_tp: MeshAxis
    pipeline: MeshAxis
    stage: MeshAxis
    replicate: MeshAxis
    fsdp: MeshAxis
    efsdp: MeshAxis
    tp: MeshAxis
    experts: MeshAxis
    ep: MeshAxis
    etp: MeshAxis
    dense: DeviceMesh | None
    sparse: DeviceMesh | None

    @property
    def sequence(self) -> MeshAxis:
        """The cp * tp ranks that hold parts of the same sequences, tp varying faster."""
        if self.layout.cp == 1:
            return self.tp
        return self.cp if self.layout.tp == 1 else self.cp_tp

    def encoders(self, over_data: bool) -> MeshAxis:
        """Return the ranks that share tiles: those of the same sequences or, with `over_data`, of a global batch."""
        if self.layout.encodes_ahead:
            return self.world if over_data else self.pipeline
        if over_data:
            return self.world if self.layout.pp == 1 else self.stage
        return self.sequence

    @property
    def joined(self) -> list[MeshAxis]:
        """The axes along which this rank communicates, the world first."""
        axes = [axis for axis in vars(self).values() if isinstance(axis, MeshAxis) and axis.size > 1]
        return [axis for axis in axes if axis is self.world or axis.group is not None]

    @property
    def traffic(self) -> Traffic:
        return self.world.traffic

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this rank writes the state that all ranks with the same layers have in common."""
        return self.world.rank % (self.layout.world_size // self.layout.pp) == 0

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank adds its tokens to a sum over the world. Tensor-parallel ranks, and the stages of a
        pipeline, have the same tokens: only the first of them adds any.
        """
        return self.tp.rank == 0 and self.pp.rank == 0


def make_meshes(layout: Layout, world: World) -> Meshes:
    """Create the meshes of a layout of this world's size. With several ranks, the process group must exist."""
    assert layout.world_size == world.size, f"{layout.axes} do not make up {world.size} ranks"
    meshes = meshes_of_rank(layout, world.rank, Traffic(heartbeat=world.heartbeat))
    if world.size == 1:
        return meshes
    groups, axes = world.groups, dict[str, Any]()
    for key, whole in splits(layout).items():
        axis: MeshAxis = getattr(meshes, key)
        group = groups.of(whole, WEIGHTS if key in ("fsdp", "efsdp", "replicate") else "")
        name = f"{axis.name}@{dist.get_process_group_ranks(group)[0]}"
        axes[key] = replace(axis, group=group, key=name)
        if axis.size > 1:
            world.heartbeat.join(name)
    if meshes.ends.size == 1:
        axes.pop("ends", None)  # ranks between the ends have made a group of their own
    meshes = replace(meshes, **axes)
    dense = _device_mesh(world, meshes.replicate, meshes.fsdp, layout.tp)
    return replace(meshes, dense=dense, sparse=_device_mesh(world, meshes.replicate, meshes.efsdp, meshes.experts.size))


def splits(layout: Layout) -> dict[str, Split]:
    """Return how the ranks are split into the groups of each axis of `Meshes`. Axes of size 1 are left out, except
    those that FSDP2 needs.
    """
    inside, experts = layout.cp * layout.tp, layout.ep * layout.etp
    dense = (layout.pp, layout.dp_replicate, layout.fsdp, layout.tp)
    batch = (layout.pp, layout.dp, layout.cp, layout.tp)
    found = {
        "pp": split(dense, 0),
        "replicate": split(dense, 1),
        "fsdp": split(dense, 2),
        "tp": split(dense, 3),
        "efsdp": split((layout.pp, layout.dp_replicate, layout.efsdp, experts), 2),
        "experts": split((layout.pp, layout.dp_replicate, layout.efsdp, experts), 3),
        "dp": split(batch, 1),
        "cp": split(batch, 2),
    }
    found = {key: whole for key, whole in found.items() if len(whole[0]) > 1 or key in ("fsdp", "efsdp")}
    meshes = meshes_of_rank(layout, 0)
    if meshes.cp_tp.size > 1:
        found["cp_tp"] = split(batch, 2, 3)
    if meshes.pipeline.size > 1:
        found["pipeline"] = split((layout.pp, layout.dp, inside), 0, 2)
    if meshes.stage.size > 1:
        found["stage"] = split(batch, 1, 2, 3)
    if meshes.ends.size > 1:
        ends = [(row[0], row[-1]) for row in found["pp"]]
        found["ends"] = (*ends, *(row[1:-1] for row in found["pp"] if row[1:-1]))
    return found


def _device_mesh(world: World, replicate: MeshAxis, shard: MeshAxis, stride: int) -> DeviceMesh:
    """Return the mesh of this rank for FSDP2, (dp_replicate, shard) or (shard), with their groups. `stride`:
    the distance between neighbours along `shard`.
    """
    assert shard.group is not None
    if replicate.group is None:
        return DeviceMesh.from_group(shard.group, world.device.type, mesh_dim_names=(shard.name,))
    shards = stride * torch.arange(shard.size)
    ranks = stride * shard.size * torch.arange(replicate.size)[:, None] + shards
    ranks += world.rank - ranks[replicate.rank, shard.rank]
    names = (replicate.name, shard.name)
    return DeviceMesh.from_group([replicate.group, shard.group], world.device.type, ranks, mesh_dim_names=names)


def meshes_of_rank(layout: Layout, rank: int, traffic: Traffic | None = None) -> Meshes:
    """Return the meshes of a rank without process groups, for planning and for counting bytes."""
    traffic = traffic or Traffic()
    outer, inner = divmod(rank, layout.fsdp * layout.tp)
    stage, experts = rank // (layout.world_size // layout.pp), layout.ep * layout.etp
    parts = layout.cp * layout.tp if layout.cp > 1 and layout.tp > 1 else 1
    inside, of_stage = layout.cp * layout.tp, layout.world_size // layout.pp
    shared = layout.pp > 1 and layout.vision.over_data_parallel and not layout.encodes_ahead
    is_end = layout.pp > 1 and stage in (0, layout.pp - 1)
    along = {
        "world": (layout.world_size, rank),
        "pp": (layout.pp, stage),
        "ends": (2, int(stage > 0)) if is_end else (1, 0),
        "cp": (layout.cp, rank // layout.tp % layout.cp),
        "cp_tp": (parts, rank % parts),
        "pipeline": (layout.pp * inside, stage * inside + rank % inside) if layout.encodes_ahead else (1, 0),
        "stage": (of_stage, rank % of_stage) if shared else (1, 0),
        "dp": (layout.dp, rank // inside % layout.dp),
        "dp_replicate": (layout.dp_replicate, outer % layout.dp_replicate),
        "fsdp": (layout.fsdp, inner // layout.tp),
        "efsdp": (layout.efsdp, inner // experts),
        "tp": (layout.tp, inner % layout.tp),
        "experts": (experts, inner % experts),
        "ep": (layout.ep, inner % experts // layout.etp),
        "etp": (layout.etp, inner % layout.etp),
    }
    axes = {name.removeprefix("dp_"): MeshAxis(name, size, at, traffic=traffic) for name, (size, at) in along.items()}
    return Meshes(layout, **axes, dense=None, sparse=None)
