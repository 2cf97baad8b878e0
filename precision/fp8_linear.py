"""FP8 linear layers for all FP8 backends: autograd, padding and saved tensors.

A layer has three GEMMs: forward, input gradient and weight gradient. The operands of each are quantised along its
contracted dimension. A library (`Arithmetic`) quantises and multiplies. The activation is saved for the weight
gradient in quantised form only. Weights are quantised once per optimizer step (`precision.quantised_weights`). Layers
with the same input quantise it once, and the gradient of their joint output too if no scale spans two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import LeviathanError
from precision.gemm import Groups
from precision.quantised_weights import QuantisedWeights

LARGEST_ERROR = 1e-2
"""Largest relative difference between a library's matmul and the emulated one; bfloat16 alone rounds by up to 2^-9."""


class Operand(Enum):
    activation = "activation"
    weight = "weight"
    gradient = "gradient"


class NotFinite(LeviathanError):
    """An operand has inf or NaN, which FP8 scales cannot represent."""


class Quantised(Protocol):
    """A quantised operand. Autograd saves its plain tensors, so that activation checkpointing can drop them."""

    def only_columns(self) -> Quantised: ...

    def tensors(self) -> Sequence[Tensor | None]: ...

    def restored(self, tensors: Sequence[Tensor | None]) -> Quantised:
        """Return the same operand with new tensors, in the order in which `tensors()` returns them."""
        ...


class Arithmetic(Protocol):
    """An FP8 library with a recipe. Operands are matrices; expert weights have three dimensions.

    A matmul that contracts an operand's last dimension needs the operand quantised along its `rows`. One that contracts
    the second-to-last dimension needs it quantised along its `columns`. An operand may be quantised along both.
    """

    compute_dtype: torch.dtype
    token_multiple: int
    joint_multiple: int | None
    """Matrices whose numbers of rows are multiples of this may be stacked, because no scale spans two of them. None if
    a scale would.
    """

    def quantise(self, x: Tensor, operand: Operand, groups: Groups | None, rows: bool, columns: bool) -> Quantised:
        """Quantise `x`. `groups`: the rows of each expert in an activation or gradient; experts never share a scale.
        May raise `NotFinite`.
        """
        ...

    def forward(self, x: Any, w: Any, groups: Groups | None) -> Tensor:
        """Return x w^T from the rows of `x` and `w`, in the compute dtype."""
        ...

    def input_gradient(self, grad: Any, w: Any, groups: Groups | None) -> Tensor:
        """Return grad w from the rows of `grad` and the columns of `w`, in the compute dtype."""
        ...

    def weight_gradient(self, grad: Any, x: Any, groups: Groups | None) -> Tensor:
        """Return grad^T x from the columns of both, in the compute dtype."""
        ...


class Float8Gemm:
    """A GEMM backend on top of an FP8 arithmetic. `where` names the module in errors."""

    def __init__(self, arithmetic: Arithmetic, where: str) -> None:
        self.arithmetic, self.where = arithmetic, where
        self.compute_dtype, self.token_multiple = arithmetic.compute_dtype, arithmetic.token_multiple
        self.weights = QuantisedWeights(self.compute_dtype, self._quantise_weight)

    @torch.compiler.disable
    def linear(self, x: Tensor, w: Tensor, groups: Groups | None = None) -> Tensor:
        y: Tensor = _Fp8Product.apply(self._padded(x, groups), groups, self, torch.is_grad_enabled(), w)
        return _like_rows(y, x, groups)

    @torch.compiler.disable
    def joint(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return the results of `linear` with each of the matrices [F, D], concatenated. `x` is quantised once.

        If no scale spans two matrices, there is one GEMM, and the gradient of the result is quantised once. The input
        gradient is then one sum, which is rounded once. All other results equal those of `linear` to the bit.
        """
        y: Tensor = _Fp8Product.apply(self._padded(x, None), None, self, torch.is_grad_enabled(), *weights)
        return _like_rows(y, x, None)

    def stacks(self, heights: Sequence[int]) -> list[slice]:
        """Return which weights are multiplied together: all, or each alone. `heights`: their numbers of rows."""
        multiple = self.arithmetic.joint_multiple
        if len(heights) > 1 and multiple is not None and not any(height % multiple for height in heights[:-1]):
            return [slice(0, len(heights))]
        return [slice(index, index + 1) for index in range(len(heights))]

    def narrowed(self, w: Tensor) -> Tensor:
        return w.to(self.compute_dtype)

    def input_gradient(self, grad: Tensor, w: Tensor, groups: Groups | None = None) -> Tensor:
        gradient = self.quantise(self._padded(grad, groups), Operand.gradient, groups, True, False)
        weight = self.weights.columns([w], self.weights.owners([w]))
        return _like_rows(self.arithmetic.input_gradient(gradient, weight, groups), grad, groups)

    def weight_gradient(self, grad: Tensor, x: Tensor, groups: Groups | None = None) -> Tensor:
        gradient = self.quantise(self._padded(grad, groups), Operand.gradient, groups, False, True)
        activation = self.quantise(self._padded(x, groups), Operand.activation, groups, False, True)
        return self.arithmetic.weight_gradient(gradient, activation, groups)

    def _quantise_weight(self, w: Tensor, rows: bool, columns: bool) -> Quantised:
        return self.quantise(w, Operand.weight, None, rows, columns)

    def quantise(self, x: Tensor, operand: Operand, groups: Groups | None, rows: bool, columns: bool) -> Quantised:
        """Cast `x` to the compute dtype, so that master weights and gathered copies give equal bytes, and quantise."""
        try:
            x = x.to(self.compute_dtype).contiguous()
            return self.arithmetic.quantise(x, operand, groups, rows, columns)
        except NotFinite:
            advice = "no FP8 scale can represent them: lower the learning rate, or use precision.backend=native"
            raise NotFinite(f"{self.where}: the {operand.value} has inf or NaN, and {advice}") from None

    def _padded(self, x: Tensor, groups: Groups | None) -> Tensor:
        """Return `x` as a matrix, with its rows zero-padded to the multiple that the arithmetic needs. With `groups`,
        return `x` as it is, because the rows of each expert are padded already.
        """
        if groups is not None:
            return x
        flat = x.flatten(0, -2)
        missing = -len(flat) % self.token_multiple
        return F.pad(flat, (0, 0, 0, missing)) if missing else flat


def _like_rows(y: Tensor, x: Tensor, groups: Groups | None) -> Tensor:
    """Return `y` without padding and with the leading dimensions of `x`. With `groups`, return `y` as it is."""
    if groups is not None:
        return y
    leading = x.shape[:-1]
    return y[: leading.numel()].unflatten(0, leading)


class _Fp8Product(torch.autograd.Function):
    """Multiplies one input by one or more weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: Groups | None, gemm: Float8Gemm, grad_enabled: bool, *weights: Tensor
    ) -> Tensor:
        # under no_grad, needs_input_grad is true all the same
        needs_x, needs_w = (grad_enabled and needed for needed in _needed(ctx))
        activation = gemm.quantise(x, Operand.activation, groups, True, needs_w)
        results, ctx.owners, ctx.stacks = [], [], gemm.stacks([w.shape[-2] for w in weights])
        for stack in ctx.stacks:
            ctx.owners.append(gemm.weights.owners(weights[stack]))
            weight = gemm.weights.rows(weights[stack], ctx.owners[-1], needs_x)
            results.append(gemm.arithmetic.forward(activation, weight, groups))
        ctx.gemm, ctx.groups, ctx.dtype = gemm, groups, x.dtype
        ctx.formats = [(w.shape[-2], w.dtype) for w in weights]
        ctx.activation = None
        kept: list[Tensor | None] = [w if needs_x else None for w in weights]
        if needs_w:
            columns = activation.only_columns()
            ctx.activation = columns.restored([None] * len(columns.tensors()))
            kept += columns.tensors()
        ctx.save_for_backward(*kept)
        return results[0] if len(results) == 1 else torch.cat(results, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gemm, groups, formats = ctx.gemm, ctx.groups, ctx.formats
        saved = ctx.saved_tensors  # unpacks, and may be read once only
        weights, kept = saved[: len(formats)], saved[len(formats) :]
        needs_x, needs_w = _needed(ctx)
        activation = ctx.activation.restored(kept) if needs_w else None
        sizes = [sum(height for height, _ in formats[stack]) for stack in ctx.stacks]
        to_x: Tensor | None = None
        to_weights: list[Tensor | None] = [None] * len(formats)
        parts = grads[0].split(sizes, -1)
        for stack, owners, part in reversed(list(zip(ctx.stacks, ctx.owners, parts, strict=True))):  # as autograd adds
            grad = gemm.quantise(part, Operand.gradient, groups, needs_x, needs_w)
            if needs_x:
                weight = gemm.weights.columns(weights[stack], owners)
                found = gemm.arithmetic.input_gradient(grad, weight, groups).to(ctx.dtype)
                to_x = found if to_x is None else to_x + found
            if needs_w:
                found = gemm.arithmetic.weight_gradient(grad, activation, groups)
                rows = found.split([height for height, _ in formats[stack]], -2)
                to_weights[stack] = [one.to(dtype) for one, (_, dtype) in zip(rows, formats[stack], strict=True)]
        return to_x, None, None, None, *to_weights


def _needed(ctx: Any) -> tuple[bool, bool]:
    """Return whether the input and any weight need a gradient."""
    return ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
