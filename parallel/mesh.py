"""Device meshes, by name. The only file that would touch private mesh calls."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import ParallelConfig
from parallel.world import World


@dataclass(frozen=True)
class Meshes:
    """`data`: what FSDP2 shards over, 1-D (dp_shard) or 2-D (dp_replicate, dp_shard). None in a world of one."""

    data: DeviceMesh | None


def make_meshes(layout: ParallelConfig, world: World) -> Meshes:
    """Meshes of a resolved layout. Needs the process group where there is more than one rank."""
    if world.size == 1:
        return Meshes(None)
    assert layout.dp_shard is not None, "resolve the layout first"
    if layout.dp_replicate == 1:
        return Meshes(init_device_mesh(world.device.type, (layout.dp_shard,), mesh_dim_names=("dp_shard",)))
    shape, names = (layout.dp_replicate, layout.dp_shard), ("dp_replicate", "dp_shard")
    return Meshes(init_device_mesh(world.device.type, shape, mesh_dim_names=names))
