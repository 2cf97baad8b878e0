"""The processes of a run as workers of a filter or a curation."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import LeviathanError
from parallel.comm.world import World


class WorldWorkers:
    """The ranks that torchrun started, as workers of the filter."""

    def __init__(self, world: World) -> None:
        self.world, self.rank, self.size = world, world.rank, world.size

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        total = torch.from_numpy(values.copy())
        torch.distributed.all_reduce(total)
        return total.numpy()

    def agree(self, error: LeviathanError | None) -> None:
        errors: list[LeviathanError | None] = [None] * self.size
        torch.distributed.all_gather_object(errors, error)
        for found in filter(None, errors):
            found.everywhere = True
            raise found
