"""The interface between the model and the backends that multiply its matrices.

Shapes: T tokens, D input size, F output size, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Row count of each expert in a tensor sorted by expert. `known`: the counts as a list, if the host has them.

    The int64 counts may sum to less than the number of rows; the results of the remaining rows are undefined.
    """

    counts_E: Tensor
    known: list[int] | None = None

    @cached_property
    def ends_E(self) -> Tensor:
        """End of each expert's rows, int32, for grouped kernels."""
        return self.counts_E.cumsum(0).to(torch.int32)

    @cached_property
    def host(self) -> list[int]:
        """The counts on the host. Unless `known` is given, the first access synchronises with the device."""
        return self.counts_E.tolist() if self.known is None else self.known


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and else float32. Sums, norms, softmax and the router have this dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """Return `x` in at least float32."""
    wide = at_least_float32(x.dtype)
    return x if x.dtype is wide else x.to(wide)


class GemmBackend(Protocol):
    """The matmuls of a layer. Tensors are local, not DTensors; weights may be wider than the compute dtype."""

    compute_dtype: torch.dtype
    token_multiple: int
    """`linear` with groups needs each expert's rows zero-padded to a multiple of this."""

    def linear(self, x: Tensor, w: Tensor, groups: Groups | None = None) -> Tensor:
        """Return x @ w^T over the last dimension of `x`, differentiable with respect to both. With `groups`, multiply
        each of the rows [C, D], which are sorted by expert, by the transposed matrix of its expert in `w` [E, F, D].
        """
        ...

    def narrowed(self, w: Tensor) -> Tensor:
        """Return a weight in the compute dtype, without a gradient."""
        ...

    # Input and weight gradients are separate, for pipelines that defer weight gradients.

    def input_gradient(self, grad: Tensor, w: Tensor, groups: Groups | None = None) -> Tensor:
        """Return the gradient of `linear` with respect to its input."""
        ...

    def weight_gradient(self, grad: Tensor, x: Tensor, groups: Groups | None = None) -> Tensor:
        """Return the gradient of `linear` with respect to its weight, [F, D] or [E, F, D], summed over all leading
        dimensions.
        """
        ...
