"""The process groups of a layout, by name.

Invariant: dense ranks pp * dp_replicate * dp_shard * cp * tp are the same as sparse ranks pp * dp_replicate * efsdp *
ep * etp. An axis further right varies faster from rank to rank. Every view is a mesh over the whole world, so all
processes create the same groups.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.comm.watchdog import Heartbeat
from parallel.comm.world import World
from parallel.layout import Layout


@dataclass
class Traffic:
    """Bytes that this rank has handed to collectives, by (axis, purpose)."""

    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    def take(self) -> dict[tuple[str, str], int]:
        """What was counted since the last call."""
        taken, self.bytes = dict(self.bytes), Counter()
        return taken


@dataclass(frozen=True)
class MeshAxis:
    """The ranks that differ along one axis of a layout only, and this rank's place among them."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    def sum(self, tensor: Tensor, purpose: str) -> None:
        """Sum `tensor` in place over these ranks."""
        self.reduce(tensor, purpose, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor, purpose: str) -> None:
        """Take the elementwise maximum over these ranks, in place."""
        self.reduce(tensor, purpose, dist.ReduceOp.MAX)

    def reduce(self, tensor: Tensor, purpose: str, operation: dist.ReduceOp.RedOpType) -> None:
        if self.size > 1:
            self.count(purpose, tensor)
            dist.all_reduce(tensor, op=operation, group=self.group)

    def count(self, purpose: str, tensor: Tensor) -> None:
        """Record that a collective begins here and is handed `tensor`."""
        self.note(purpose, tensor.nbytes)

    def note(self, purpose: str, size: int) -> None:
        """Record that a collective which other code issues begins and is handed `size` bytes."""
        self.traffic.heartbeat.begin(self.name, purpose, self.group)
        self.add_bytes(purpose, size)

    def send(self, purpose: str, tensor: Tensor) -> None:
        """Record that this rank sends a tensor to one other rank. Ranks may do so unequally often."""
        self.wait(purpose)
        self.add_bytes(purpose, tensor.nbytes)

    def wait(self, purpose: str) -> None:
        """Record that this rank now waits for one other rank."""
        self.traffic.heartbeat.wait(self.name, purpose, self.group)

    def add_bytes(self, purpose: str, size: int) -> None:
        self.traffic.bytes[self.name, purpose] += size


@dataclass(frozen=True)
class Meshes:
    """This rank's place in its layout.

    `pp`: the ranks that hold other layers of the same model. `ends`: the first and the last of them, which share tied
    embeddings (size 1 on ranks between). `dp`: the groups that get different sequences of a batch. `cp`: the ranks that
    hold other parts of the same sequences. `experts`: the ep * etp ranks that share the routed experts, etp varying
    faster; `ep` and `etp` are coordinates in it without groups of their own. `dense` and `sparse`: the meshes over
    which FSDP2 shards parameters, (fsdp) or (dp_replicate, fsdp); None in a world of one.
    """

    layout: Layout
    world: MeshAxis
    pp: MeshAxis
    ends: MeshAxis
    dp: MeshAxis
    cp: MeshAxis
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
    def joined(self) -> list[MeshAxis]:
        """The axes along which this rank communicates, the world first."""
        axes = [axis for axis in vars(self).values() if isinstance(axis, MeshAxis) and axis.size > 1]
        return [axis for axis in axes if axis is self.world or axis.group is not None]

    @property
    def traffic(self) -> Traffic:
        return self.world.traffic

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this rank writes what all ranks with the same layers have."""
        return self.world.rank % (self.layout.world_size // self.layout.pp) == 0

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank counts its tokens in a sum over the world. Tensor-parallel ranks, and the stages of a
        pipeline, see the same tokens.
        """
        return self.tp.rank == 0 and self.pp.rank == 0


def make_meshes(layout: Layout, world: World) -> Meshes:
    """Create the meshes of a layout of this world's size. Needs the process group where there are several ranks."""
    assert layout.world_size == world.size, f"{layout.axes} do not make up {world.size} ranks"
    views = _Views(world, Traffic(heartbeat=world.heartbeat))
    outer = {"pp": layout.pp, "dp_replicate": layout.dp_replicate}
    dense = views.make({**outer, "fsdp": layout.fsdp, "tp": layout.tp})
    sparse = views.make({**outer, "efsdp": layout.efsdp, "experts": layout.ep * layout.etp})
    batch = views.make({"pp": layout.pp, "dp": layout.dp, "cp": layout.cp, "tp": layout.tp})
    experts = views.axis(sparse, "experts")
    return Meshes(
        layout,
        world=MeshAxis("world", world.size, world.rank, None, views.traffic),
        pp=(pp := views.axis(batch, "pp")),
        ends=views.ends(pp),
        dp=views.axis(batch, "dp"),
        cp=views.axis(batch, "cp"),
        replicate=views.axis(dense, "dp_replicate"),
        fsdp=views.axis(dense, "fsdp"),
        efsdp=views.axis(sparse, "efsdp"),
        tp=views.axis(dense, "tp"),
        experts=experts,
        ep=MeshAxis("ep", layout.ep, experts.rank // layout.etp),
        etp=MeshAxis("etp", layout.etp, experts.rank % layout.etp),
        dense=_data_mesh(dense, "fsdp"),
        sparse=_data_mesh(sparse, "efsdp"),
    )


def meshes_of_rank(layout: Layout, rank: int) -> Meshes:
    """The place of a rank in a layout, without process groups: for planning and counting."""
    outer, inner = divmod(rank, layout.fsdp * layout.tp)
    experts = layout.ep * layout.etp
    along = {
        "pp": (layout.pp, rank // (layout.world_size // layout.pp)),
        "cp": (layout.cp, rank // layout.tp % layout.cp),
        "dp": (layout.dp, rank // (layout.cp * layout.tp) % layout.dp),
        "dp_replicate": (layout.dp_replicate, outer % layout.dp_replicate),
        "fsdp": (layout.fsdp, inner // layout.tp),
        "efsdp": (layout.efsdp, inner // experts),
        "tp": (layout.tp, inner % layout.tp),
        "experts": (experts, inner % experts),
        "ep": (layout.ep, inner % experts // layout.etp),
        "etp": (layout.etp, inner % layout.etp),
    }
    at_end = along["pp"][1] in (0, layout.pp - 1)
    along["ends"] = (2, int(along["pp"][1] > 0)) if layout.pp > 1 and at_end else (1, 0)
    axes = {name.removeprefix("dp_"): MeshAxis(name, size, at) for name, (size, at) in along.items()}
    return Meshes(layout, world=MeshAxis("world", layout.world_size, rank), **axes, dense=None, sparse=None)


@dataclass(frozen=True)
class _Views:
    world: World
    traffic: Traffic

    def make(self, sizes: dict[str, int]) -> DeviceMesh | None:
        """The world as a mesh of these sizes. Axes of one rank get no group, except those that FSDP2 needs."""
        if self.world.size == 1:
            return None
        kept = {name: size for name, size in sizes.items() if size > 1 or name in ("fsdp", "efsdp")}
        return init_device_mesh(self.world.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))

    def axis(self, mesh: DeviceMesh | None, name: str) -> MeshAxis:
        if mesh is None or name not in (mesh.mesh_dim_names or ()):
            return MeshAxis(name, traffic=self.traffic)
        group = mesh.get_group(name)
        return MeshAxis(name, dist.get_world_size(group), mesh.get_local_rank(name), group, self.traffic)

    def ends(self, pp: MeshAxis) -> MeshAxis:
        """The first and the last rank of a pipeline."""
        if pp.size == 1 or pp.rank not in (0, pp.size - 1):
            return MeshAxis("ends", traffic=self.traffic)
        assert pp.group is not None
        members = dist.get_process_group_ranks(pp.group)
        group = pp.group
        if pp.size > 2:
            group = dist.new_group([members[0], members[-1]], use_local_synchronization=True)
        return MeshAxis("ends", 2, int(pp.rank > 0), group, self.traffic)


def _data_mesh(mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    if mesh is None:
        return None
    replicated = "dp_replicate" in (mesh.mesh_dim_names or ())
    return mesh["dp_replicate", name] if replicated else mesh[name]
