"""Context parallelism: each rank of the axis has a part of every row.

Shapes: B batch, T sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.context import SequenceContext
from model.transformer import Transformer
from parallel.mesh import Axis


def apply(model: Transformer, axis: Axis) -> None:
    """Give every attention the way in which it sees keys on other ranks."""


@dataclass(frozen=True)
class Share:
    """This rank's part of rows of one length."""

    axis: Axis
    length: int

    def take(self, x_BT: Tensor) -> Tensor:
        """This rank's columns."""
        return x_BT

    def context(
        self, positions_BT: Tensor, device: torch.device, routed_tokens: float | None = None
    ) -> SequenceContext:
        """What the layers know of whole rows at these positions."""
        return SequenceContext(positions_BT, device, routed_tokens)


def share(model: ModelConfig, length: int, axis: Axis) -> Share:
    """How rows of this length are divided."""
    return Share(axis, length)
