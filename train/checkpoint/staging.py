"""CPU memory into which a rank copies its state before a save in the background. It is allocated once and reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from parallel.comm.world import wait_for
from train.checkpoint.state import TensorShard

_ALIGNMENT = 64
"""Bytes. A tensor must begin at a multiple of its element size."""


class Staging:
    """Copies shards into one buffer, which holds as much as the largest save. For a GPU the buffer is pinned, so that
    copies run at the speed of the bus.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, shards: Sequence[TensorShard]) -> list[TensorShard]:
        """Return copies of the shards. They are valid until the next call, which overwrites them."""
        sizes = [-(-one.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for one in shards]
        if sum(sizes) > len(self._buffer):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # frees the old one first
            self._buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        copies, start = list[TensorShard](), 0
        for one, size in zip(shards, sizes, strict=True):
            room = self._buffer[start : start + one.tensor.nbytes].view(one.tensor.dtype).view(one.tensor.shape)
            copies.append(replace(one, tensor=room.copy_(one.tensor.detach(), non_blocking=True)))
            start += size
        wait_for(self.device)
        return copies
