"""The seam between the model and whoever multiplies its matrices.

Shapes: T tokens, D input width, F output width, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from core.errors import ConfigError


class Compute(Enum):
    """The number format of activations and matrix products."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


class Storage(Enum):
    """The number format in which parameters, gradients and optimizer state are kept."""

    master = "master"
    """float32, float64 under float64."""
    bfloat16 = "bfloat16"
    """Half the memory; updates smaller than 1/256 of a weight are lost."""


@dataclass(frozen=True)
class PrecisionConfig:
    """`compute` is the format of the products, `storage` that of what is kept: bfloat16 and master are bf16 products
    with fp32 master weights.
    """

    compute: Compute = Compute.float32
    storage: Storage = Storage.master

    def __post_init__(self) -> None:
        if self.storage is Storage.bfloat16 and self.compute is not Compute.bfloat16:
            reason = "would lose what wider products gain; add precision.compute=bfloat16"
            raise ConfigError("storage", self.storage, reason, [Storage.master.value])

    @property
    def compute_dtype(self) -> torch.dtype:
        return {
            Compute.bfloat16: torch.bfloat16,
            Compute.float32: torch.float32,
            Compute.float64: torch.float64,
        }[self.compute]

    @property
    def master_dtype(self) -> torch.dtype:
        """What parameters are kept in."""
        if self.storage is Storage.bfloat16:
            return torch.bfloat16
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

    # The same products' gradients one by one, for pipelines that compute those of weights later.

    def input_gradient(self, grad_TF: Tensor, w_FD: Tensor) -> Tensor:
        """Of `linear` by its input."""
        ...

    def weight_gradient(self, grad_TF: Tensor, x_TD: Tensor) -> Tensor:
        """Of `linear` by its weight, summed over all leading dimensions: [F, D]."""
        ...

    def grouped_input_gradient(self, grad_CF: Tensor, w_EFD: Tensor, counts_E: Tensor) -> Tensor:
        """Of `grouped_linear` by its rows."""
        ...

    def grouped_weight_gradient(self, grad_CF: Tensor, x_CD: Tensor, counts_E: Tensor) -> Tensor:
        """Of `grouped_linear` by its weights: [E, F, D]."""
        ...


def resolve(config: PrecisionConfig) -> GemmBackend:
    """The backend that `config` asks for, or an error that says why it cannot be had."""
    from precision.bf16 import PlainProducts

    return PlainProducts(config.compute_dtype)
