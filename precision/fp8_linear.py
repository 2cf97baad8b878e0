"""FP8 linear layers for all FP8 backends: autograd, padding and saved tensors.

A layer has three GEMMs: forward, input gradient and weight gradient. The operands of each are quantised along its
contracted dimension. A library (`Arithmetic`) quantises and multiplies. The activation is saved for the weight
gradient in quantised form only.
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

    @torch.compiler.disable
    def linear(self, x: Tensor, w: Tensor, groups: Groups | None = None) -> Tensor:
        y: Tensor = _Fp8Product.apply(self._padded(x, groups), w, groups, self, torch.is_grad_enabled())
        return _like_rows(y, x, groups)

    def narrowed(self, w: Tensor) -> Tensor:
        return w.to(self.compute_dtype)

    def input_gradient(self, grad: Tensor, w: Tensor, groups: Groups | None = None) -> Tensor:
        gradient = self.quantise(self._padded(grad, groups), Operand.gradient, groups, True, False)
        weight = self.quantise(w, Operand.weight, None, False, True)
        return _like_rows(self.arithmetic.input_gradient(gradient, weight, groups), grad, groups)

    def weight_gradient(self, grad: Tensor, x: Tensor, groups: Groups | None = None) -> Tensor:
        gradient = self.quantise(self._padded(grad, groups), Operand.gradient, groups, False, True)
        activation = self.quantise(self._padded(x, groups), Operand.activation, groups, False, True)
        return self.arithmetic.weight_gradient(gradient, activation, groups)

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
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, groups: Groups | None, gemm: Float8Gemm, grad_enabled: bool) -> Tensor:
        # under no_grad, needs_input_grad is true all the same
        needs_x, needs_w = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        activation = gemm.quantise(x, Operand.activation, groups, True, needs_w)
        weight = gemm.quantise(w, Operand.weight, None, True, False)
        y = gemm.arithmetic.forward(activation, weight, groups)
        ctx.gemm, ctx.groups, ctx.dtypes = gemm, groups, (x.dtype, w.dtype)
        ctx.activation = None
        kept: list[Tensor | None] = [w if needs_x else None]
        if needs_w:
            columns = activation.only_columns()
            ctx.activation = columns.restored([None] * len(columns.tensors()))
            kept += columns.tensors()
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        gemm, groups, arithmetic = ctx.gemm, ctx.groups, ctx.gemm.arithmetic
        w, *kept = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad[:2]
        grad = gemm.quantise(grads[0], Operand.gradient, groups, needs_x, needs_w)
        grad_x = grad_w = None
        if needs_x:
            weight = gemm.quantise(w, Operand.weight, None, False, True)
            grad_x = arithmetic.input_gradient(grad, weight, groups).to(ctx.dtypes[0])
        if needs_w:
            activation = ctx.activation.restored(kept)
            grad_w = arithmetic.weight_gradient(grad, activation, groups).to(ctx.dtypes[1])
        return grad_x, grad_w, None, None, None
