"""The seam between the model and whoever multiplies its matrices.

Shapes: T tokens, D input width, F output width, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Compute(Enum):
    """The number format of activations and matrix products."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


@dataclass(frozen=True)
class PrecisionConfig:
    """`compute` is the format of the products; parameters and optimizer state are kept in float32 (float64 under
    float64), so bfloat16 means bf16 products with fp32 master weights.
    """

    compute: Compute = Compute.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        return {
            Compute.bfloat16: torch.bfloat16,
            Compute.float32: torch.float32,
            Compute.float64: torch.float64,
        }[self.compute]

    @property
    def master_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute is Compute.float64 else torch.float32


class GemmBackend(Protocol):
    """What a layer may ask for. All tensors are local and plain; weights may be kept in a wider format."""

    compute_dtype: torch.dtype
    token_multiple: int
    """Each expert's tokens must be padded to a multiple of this before `grouped_linear`."""

    def linear(self, x_TD: Tensor, w_FD: Tensor) -> Tensor:
        """x @ w^T over the last dimension of `x`, differentiable in both; leading dimensions are kept."""
        ...

    def grouped_linear(self, x_CD: Tensor, w_EFD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert times that expert's matrix: `counts_E` (int64, sums to C) says how many each has."""
        ...


def resolve(config: PrecisionConfig) -> GemmBackend:
    """The backend that `config` asks for, or an error that says why it cannot be had."""
    from precision.bf16 import PlainProducts

    return PlainProducts(config.compute_dtype)
