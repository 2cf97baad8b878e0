"""Copies of weights in the dtype of the matmuls, refreshed when a weight has changed: once per optimizer step.

Without them every micro-batch casts every weight again, and keeps the result until its backward pass. FSDP2 casts a
rank's shard of the weights at every all-gather. The gathered weights have the compute dtype, so no copies are made of
them; matrices that are multiplied as one are stacked in the forward pass and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


def parameter_of(w: Tensor) -> Tensor | None:
    """Return the parameter that `w` is in another shape, or None if it is a part of one or was computed."""
    owner = w if w._base is None else w._base
    return owner if owner.is_leaf and owner.numel() == w.numel() and w.is_contiguous() else None


def state_of(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return PyTorch's count of writes and the storage of each weight. What was made of it is stale if they change."""
    return [(w._version, w.data_ptr()) for w in weights]


@dataclass
class WeightClock:
    """Counts the times at which an engine has written a model's weights. `ticks` is None where no engine does, and
    weights are then cast at each use: PyTorch's own counter of writes misses some, such as those of the fused AdamW.
    """

    ticks: int | None = None

    def tick(self) -> None:
        self.ticks = 1 + (self.ticks or 0)


class WeightCopies:
    """The copies of one or more layers, which live as long as the weights. A copy costs the memory of the weight in
    `dtype`.
    """

    def __init__(self, dtype: torch.dtype, clock: WeightClock | None = None) -> None:
        self.dtype, self.clock = dtype, clock or WeightClock()
        self._kept: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __reduce__(self) -> Any:  # a backend that is sent to another process begins without copies
        return WeightCopies, (self.dtype, self.clock)

    def narrow(self, w: Tensor) -> Tensor:
        """Return `w` in the compute dtype, differentiable. `w` may be a whole parameter in another shape."""
        if w.dtype is self.dtype or self.clock.ticks is None or torch.compiler.is_compiling():
            return w.to(self.dtype)
        return _Narrowed.apply(self.plain(w), w)

    def plain(self, w: Tensor) -> Tensor:
        """Return `w` in the compute dtype, without a gradient."""
        owner = parameter_of(w)
        if w.dtype is self.dtype or owner is None or self.clock.ticks is None:
            return w.detach().to(self.dtype)
        return self._copy([owner]).view(w.shape)

    def joint(self, weights: list[Tensor]) -> Tensor:
        """Return matrices [F, D] stacked along F in the compute dtype, differentiable."""
        if torch.compiler.is_compiling() or not self.keeps(weights):
            return torch.cat([w.to(self.dtype) for w in weights])
        return _Narrowed.apply(self._copy(weights), *weights)

    def keeps(self, weights: Sequence[Tensor]) -> bool:
        """Return whether a copy of these stacked matrices would be kept."""
        return self.clock.ticks is not None and all(w.is_leaf and w.dtype is not self.dtype for w in weights)

    @torch.no_grad()
    def _copy(self, weights: list[Tensor]) -> Tensor:
        """Return the stacked copy of these parameters, which is refreshed if one of them was written."""
        state = self.clock.ticks, state_of(weights)
        copies = self._kept.setdefault(weights[0], {})  # a weight may be stacked with others, or stand alone
        versions, copy = copies.get(len(weights), (None, None))
        shape = (sum(len(w) for w in weights), *weights[0].shape[1:])
        if copy is None or copy.shape != shape:
            copy = weights[0].new_empty(shape, dtype=self.dtype)
        if versions != state:
            parts = copy.split([len(w) for w in weights])
            for part, w in zip(parts, weights, strict=True):
                part.copy_(w)
            copies[len(weights)] = state, copy
        return copy


class _Narrowed(torch.autograd.Function):
    """Passes a copy on as the value of its weights, and the copy's gradient to them in their own dtypes."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, *weights: Tensor) -> Tensor:
        ctx.parts = [(len(w), w.dtype) for w in weights]
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = grads[0].split([rows for rows, _ in ctx.parts])
        return None, *(part.to(dtype) for part, (_, dtype) in zip(parts, ctx.parts, strict=True))
