"""The process groups of a layout, by name.

Invariant: dense ranks pp * dp_replicate * dp_shard * cp * tp are the same as sparse ranks pp * dp_replicate * efsdp *
ep * etp; an axis further right varies faster from rank to rank. Every view is a mesh over the whole world, so that one
process makes the groups that all others make.
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
    pulse: Heartbeat = field(default_factory=Heartbeat)

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
        """The elementwise maximum over these ranks, in place."""
        self.reduce(tensor, purpose, dist.ReduceOp.MAX)

    def reduce(self, tensor: Tensor, purpose: str, operation: dist.ReduceOp.RedOpType) -> None:
        if self.size > 1:
            self.count(purpose, tensor)
            dist.all_reduce(tensor, op=operation, group=self.group)

    def count(self, purpose: str, tensor: Tensor) -> None:
        """Note that a collective begins here, and the bytes that it is handed."""
        self.note(purpose, tensor.numel() * tensor.element_size())

    def note(self, purpose: str, size: int) -> None:
        """The same for one that others make, which is handed so many bytes."""
        self.traffic.pulse.begin(self.name, purpose, self.group)
        self.traffic.bytes[self.name, purpose] += size

    def send(self, purpose: str, tensor: Tensor) -> None:
        """Note that this rank sends a tensor to one other; ranks need not do so equally often."""
        self.wait(purpose)
        self.traffic.bytes[self.name, purpose] += tensor.numel() * tensor.element_size()

    def wait(self, purpose: str) -> None:
        """Note that this rank now waits for one other."""
        self.traffic.pulse.wait(self.name, purpose, self.group)


@dataclass(frozen=True)
class Meshes:
    """Where this rank stands in its layout.

    `pp`: the ranks that hold other layers of the same model; `ends`: the first and the last of them, which share a tied
    table (of size 1 on those between). `rows`: the groups that see different rows of a batch; `cp`: those that hold
    other parts of the same rows. `experts`: the ep * etp ranks that share the routed experts among them, etp varying
    faster; `ep` and `etp` are places in it without groups of their own. `dense` and `sparse`: what FSDP2 spreads
    parameters over, (fsdp) or (dp_replicate, fsdp); None in a world of one.
    """

    layout: Layout
    world: MeshAxis
    pp: MeshAxis
    ends: MeshAxis
    rows: MeshAxis
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
        """The axes along which this rank speaks to others, the world first."""
        axes = [axis for axis in vars(self).values() if isinstance(axis, MeshAxis) and axis.size > 1]
        return [axis for axis in axes if axis is self.world or axis.group is not None]

    @property
    def traffic(self) -> Traffic:
        return self.world.traffic

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this rank is the one, among those that hold the same layers, to write what they all have."""
        return self.world.rank % (self.layout.world_size // self.layout.pp) == 0

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank is the one, among those that know the same tokens, to count them in a sum over the world:
        tensor-parallel ranks see the same, and so do the stages of a pipeline.
        """
        return self.tp.rank == 0 and self.pp.rank == 0


def make_meshes(layout: Layout, world: World) -> Meshes:
    """Meshes of a layout of this world's size. Needs the process group where there is more than one rank."""
    assert layout.world_size == world.size, f"{layout.axes} do not make up {world.size} ranks"
    views = _Views(world, Traffic(pulse=world.pulse))
    outer = {"pp": layout.pp, "dp_replicate": layout.dp_replicate}
    dense = views.make({**outer, "fsdp": layout.fsdp, "tp": layout.tp})
    sparse = views.make({**outer, "efsdp": layout.efsdp, "experts": layout.ep * layout.etp})
    rows = views.make({"pp": layout.pp, "rows": layout.rows, "cp": layout.cp, "tp": layout.tp})
    experts = views.axis(sparse, "experts")
    return Meshes(
        layout,
        world=MeshAxis("world", world.size, world.rank, None, views.traffic),
        pp=(pp := views.axis(rows, "pp")),
        ends=views.ends(pp),
        rows=views.axis(rows, "rows"),
        cp=views.axis(rows, "cp"),
        replicate=views.axis(dense, "dp_replicate"),
        fsdp=views.axis(dense, "fsdp"),
        efsdp=views.axis(sparse, "efsdp"),
        tp=views.axis(dense, "tp"),
        experts=experts,
        ep=MeshAxis("ep", layout.ep, experts.rank // layout.etp),
        etp=MeshAxis("etp", layout.etp, experts.rank % layout.etp),
        dense=_data(dense, "fsdp"),
        sparse=_data(sparse, "efsdp"),
    )


def place(layout: Layout, rank: int) -> Meshes:
    """Where a rank of a layout stands, without a process group: for what is only to be counted."""
    outer, inner = divmod(rank, layout.fsdp * layout.tp)
    experts = layout.ep * layout.etp
    along = {
        "pp": (layout.pp, rank // (layout.world_size // layout.pp)),
        "cp": (layout.cp, rank // layout.tp % layout.cp),
        "rows": (layout.rows, rank // (layout.cp * layout.tp) % layout.rows),
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
        """The world folded this way. Axes of one rank get no group, but those that FSDP2 needs a mesh for."""
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


def _data(mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    if mesh is None:
        return None
    replicated = "dp_replicate" in (mesh.mesh_dim_names or ())
    return mesh["dp_replicate", name] if replicated else mesh[name]
