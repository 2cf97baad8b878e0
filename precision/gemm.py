"""The seam between the model and whoever multiplies its matrices.

Shapes: T tokens, D input width, F output width, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """How rows that are sorted by expert divide among the experts. `counts_E`: int64; their sum may be less than the
    number of rows, and what a product gives for the rows beyond it may be anything. `known`: the counts, where somebody
    has them on the host already.
    """

    counts_E: Tensor
    known: list[int] | None = None

    @cached_property
    def ends_E(self) -> Tensor:
        """Where each expert's rows end, as grouped kernels want it: int32."""
        return self.counts_E.cumsum(0).to(torch.int32)

    @cached_property
    def host(self) -> list[int]:
        """The counts on the host. Asking waits for the device, once, if they are not known."""
        return self.counts_E.tolist() if self.known is None else self.known


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The format of sums and of what is no matrix product: float64 stays what it is, anything narrower is widened."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(at_least_float32(x.dtype))


class GemmBackend(Protocol):
    """What a layer may ask for. All tensors are local and plain; weights may be kept in a wider format."""

    compute_dtype: torch.dtype
    token_multiple: int
    """Each expert's tokens must be padded with zeros to a multiple of this before `grouped_linear`."""

    def linear(self, x_TD: Tensor, w_FD: Tensor) -> Tensor:
        """x @ w^T over the last dimension of `x`, differentiable in both; leading dimensions are kept."""
        ...

    def grouped_linear(self, x_CD: Tensor, w_EFD: Tensor, groups: Groups) -> Tensor:
        """Rows sorted by expert times that expert's matrix."""
        ...

    # The same products' gradients one by one, for pipelines that compute those of weights later.

    def input_gradient(self, grad_TF: Tensor, w_FD: Tensor) -> Tensor:
        """Of `linear` by its input."""
        ...

    def weight_gradient(self, grad_TF: Tensor, x_TD: Tensor) -> Tensor:
        """Of `linear` by its weight, summed over all leading dimensions: [F, D]."""
        ...

    def grouped_input_gradient(self, grad_CF: Tensor, w_EFD: Tensor, groups: Groups) -> Tensor:
        """Of `grouped_linear` by its rows."""
        ...

    def grouped_weight_gradient(self, grad_CF: Tensor, x_CD: Tensor, groups: Groups) -> Tensor:
        """Of `grouped_linear` by its weights: [E, F, D]."""
        ...
