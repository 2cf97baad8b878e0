"""Matmuls by PyTorch in bfloat16, float32 or float64.

Shapes: E experts, C routed tokens (sorted by expert), M, N, K sides of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from precision import cpu_gemm
from precision.gemm import Groups
from precision.weight_copies import WeightClock, WeightCopies

_FEW_ROWS = 16
"""Rows up to which `cpu_gemm.multiply_few_rows` multiplies them."""


class NativeGemm:
    """Casts both operands to the compute dtype and multiplies. Gradients of bf16 matmuls accumulate in the dtype of the
    master weights, fp32.
    """

    token_multiple = 1

    def __init__(self, compute_dtype: torch.dtype, clock: WeightClock | None = None) -> None:
        self.compute_dtype = compute_dtype
        self.copies = WeightCopies(compute_dtype, clock)

    def linear(self, x: Tensor, w: Tensor, groups: Groups | None = None) -> Tensor:
        if x.dtype.itemsize < self.compute_dtype.itemsize and groups is None and torch.is_grad_enabled():
            return _WidenedProduct.apply(x, w.to(self.compute_dtype))
        if x.dtype is not self.compute_dtype or w.dtype is not self.compute_dtype:  # a call costs more than this
            x, w = x.to(self.compute_dtype), self.copies.narrow(w)
        if groups is None:
            if not torch.is_grad_enabled() and x.numel() <= _FEW_ROWS * w.shape[1]:
                return cpu_gemm.multiply_few_rows(x, w)
            rows = x.shape[:-1].numel()
            by_onednn = rows % 64 == 0 and cpu_gemm.is_faster(x, rows, *w.shape)
            return _NativeProduct.apply(x, w, None) if by_onednn else F.linear(x, w)
        if groups.known is not None and x.device.type == "cpu" and not torch.is_grad_enabled():
            return _of_used_experts(x, w, groups.known)
        if _loops(x, *w.shape) or cpu_gemm.is_large(w, w.shape):
            return _NativeProduct.apply(x, w, groups)
        return F.grouped_mm(x, w.transpose(1, 2), offs=groups.ends_E)

    def joint(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return the results of `linear` with each of the matrices [F, D], concatenated, as one matmul."""
        if self.copies.keeps(weights) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.linear(x, self.copies.joint(list(weights)))
        dtype = self.compute_dtype
        return _JointProduct.apply(x.to(dtype), *(w.to(dtype) for w in weights))

    def narrowed(self, w: Tensor) -> Tensor:
        return self.copies.plain(w)

    def input_gradient(self, grad: Tensor, w: Tensor, groups: Groups | None = None) -> Tensor:
        return _input_gradient(grad.to(self.compute_dtype), w.to(self.compute_dtype), groups)

    def weight_gradient(self, grad: Tensor, x: Tensor, groups: Groups | None = None) -> Tensor:
        return _weight_gradient(grad.to(self.compute_dtype), x.to(self.compute_dtype), groups)


class _NativeProduct(torch.autograd.Function):
    """Replaces F.linear, or F.grouped_mm with transposed matrices, where the function lacks a kernel or is slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, groups: Groups | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.groups = groups
        return cpu_gemm.multiply(x, w.t()) if groups is None else _by_rows(x, w.transpose(1, 2), groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, w), (grad,), groups = ctx.saved_tensors, grads, ctx.groups
        needs_x, needs_w, _ = ctx.needs_input_grad
        grad_x = _input_gradient(grad, w, groups) if needs_x else None
        return grad_x, _weight_gradient(grad, x, groups) if needs_w else None, None


class _JointProduct(torch.autograd.Function):
    """Multiplies by stacked matrices, and stacks them again in the backward pass: under FSDP2 a stack that was saved
    would keep a layer's weights after they are freed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return F.linear(x, torch.cat(weights))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, *needs_w = ctx.needs_input_grad
        to_x = _input_gradient(grads[0], torch.cat(weights), None) if needs_x else None
        if not any(needs_w):
            return to_x, *(None for _ in weights)
        return to_x, *_weight_gradient(grads[0], x, None).split([len(w) for w in weights])


class _WidenedProduct(torch.autograd.Function):
    """Multiplies in the wide dtype of `w`, and saves the narrow input: half of its bytes for bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x.to(w.dtype), w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        needs_x, needs_w = ctx.needs_input_grad
        grad_x = _input_gradient(grads[0], w, None).to(x.dtype) if needs_x else None
        return grad_x, _weight_gradient(grads[0], x.to(w.dtype), None) if needs_w else None


def _input_gradient(grad: Tensor, w: Tensor, groups: Groups | None) -> Tensor:
    return cpu_gemm.multiply(grad, w) if groups is None else _by_rows(grad, w, groups)


def _weight_gradient(grad: Tensor, x: Tensor, groups: Groups | None) -> Tensor:
    if groups is None:
        transposed, rows = grad.flatten(0, -2).t(), x.flatten(0, -2)
        return cpu_gemm.multiply(transposed, rows) if cpu_gemm.FULL_WIDTH else transposed @ rows
    return _by_columns(grad, x, groups)


def _loops(like: Tensor, groups: int, *widths: int) -> bool:
    """Return whether F.grouped_mm lacks a kernel for this matmul or is slower than a loop over the groups."""
    has_rows = len(like) >= 64 * max(groups, 1)  # at least 64 rows per group, on average
    return like.dtype is torch.float64 or (has_rows and cpu_gemm.FULL_WIDTH and cpu_gemm.is_faster(like, *widths))


def _by_rows(a_CK: Tensor, b_EKN: Tensor, groups: Groups) -> Tensor:
    """Multiply each group's rows by its matrix: [C, N]."""
    if not _loops(a_CK, *b_EKN.shape):
        return F.grouped_mm(a_CK, b_EKN, offs=groups.ends_E)
    y_CN = a_CK.new_empty(a_CK.shape[0], b_EKN.shape[2])
    for a, b, y in zip(_parts(a_CK, groups), b_EKN, _parts(y_CN, groups), strict=True):
        cpu_gemm.multiply_rows(a, b, y)
    return y_CN


def _by_columns(a_CM: Tensor, b_CN: Tensor, groups: Groups) -> Tensor:
    """Multiply the transpose of each group's rows of `a` by its rows of `b`: [E, M, N]."""
    shape = (len(groups.counts_E), a_CM.shape[1], b_CN.shape[1])
    if not _loops(a_CM, *shape) and not cpu_gemm.is_large(a_CM, shape):
        return F.grouped_mm(a_CM.t(), b_CN, offs=groups.ends_E)
    y_EMN = cpu_gemm.empty(a_CM, shape)
    for a, b, y in zip(_parts(a_CM, groups), _parts(b_CN, groups), y_EMN, strict=True):
        cpu_gemm.multiply_columns(a, b, y)
    return y_EMN


def _of_used_experts(x_CK: Tensor, w_ENK: Tensor, counts: list[int]) -> Tensor:
    """Multiply each group's rows by the transpose of its matrix, skipping groups without rows: [C, N]. F.grouped_mm
    takes longer for a few rows, since it multiplies empty groups too.
    """
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            rows_CK = x_CK if count == len(x_CK) else x_CK[start : start + count]
            multiply = cpu_gemm.multiply_few_rows if count <= _FEW_ROWS else F.linear
            found.append(multiply(rows_CK, w_ENK.select(0, expert)))
            start += count
    if start < len(x_CK) or not found:
        found.append(x_CK.new_zeros(len(x_CK) - start, w_ENK.shape[1]))
    return found[0] if len(found) == 1 else torch.cat(found)


def _parts(x_CN: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    return x_CN[: sum(groups.host)].split(groups.host)
