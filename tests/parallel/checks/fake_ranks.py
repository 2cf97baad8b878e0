"""Play each rank of a world in turn in this process, on a process group that sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.checks.recorder import Issued, recording
from parallel.comm.world import World
from parallel.layout import ParallelConfig
from parallel.mesh import Meshes, make_meshes


@contextmanager
def playing(rank: int, parallel: ParallelConfig, count: int) -> Iterator[Meshes]:
    """Yield the meshes of one rank of `count`."""
    dist.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    try:
        yield make_meshes(parallel.resolve(count), World(rank, count, torch.device("cpu")))
    finally:
        dist.destroy_process_group()


def issued_by_all(
    count: int, parallel: ParallelConfig, program: Callable[[Meshes], None], only: int | None = None
) -> list[list[Issued]]:
    """Return what each rank, or the rank `only`, issues in `program`."""
    found = []
    for rank in range(count) if only is None else [only]:
        with playing(rank, parallel, count) as meshes, recording() as recorder:
            program(meshes)
        found.append(recorder.issued)
    return found
