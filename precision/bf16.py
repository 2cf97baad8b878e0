"""Plain products of PyTorch in bfloat16, float32 or float64.

Shapes: T tokens, D input width, F output width, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from precision.backend import Groups


class PlainProducts:
    """Casts both sides to the compute format and multiplies. With fp32 weights and bf16 products the cast is part of
    the graph, so gradients reach the fp32 master weights and accumulate there.
    """

    token_multiple = 1

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self.compute_dtype = compute_dtype

    def linear(self, x_TD: Tensor, w_FD: Tensor) -> Tensor:
        return F.linear(x_TD.to(self.compute_dtype), w_FD.to(self.compute_dtype))

    def grouped_linear(self, x_CD: Tensor, w_EFD: Tensor, groups: Groups) -> Tensor:
        x_CD, w_EFD = x_CD.to(self.compute_dtype), w_EFD.to(self.compute_dtype)
        if self.compute_dtype is torch.float64:  # F.grouped_mm has no float64 kernel
            return _grouped_by_loop(x_CD, w_EFD, groups)
        return F.grouped_mm(x_CD, w_EFD.transpose(-2, -1), offs=groups.ends_E)

    def input_gradient(self, grad_TF: Tensor, w_FD: Tensor) -> Tensor:
        return grad_TF.to(self.compute_dtype) @ w_FD.to(self.compute_dtype)

    def weight_gradient(self, grad_TF: Tensor, x_TD: Tensor) -> Tensor:
        grad, x = (t.to(self.compute_dtype).flatten(0, -2) for t in (grad_TF, x_TD))
        return grad.t() @ x

    def grouped_input_gradient(self, grad_CF: Tensor, w_EFD: Tensor, groups: Groups) -> Tensor:
        grad_CF, w_EFD = grad_CF.to(self.compute_dtype), w_EFD.to(self.compute_dtype)
        if self.compute_dtype is torch.float64:
            return _input_gradient_by_loop(grad_CF, w_EFD, groups.host)
        return F.grouped_mm(grad_CF, w_EFD, offs=groups.ends_E)

    def grouped_weight_gradient(self, grad_CF: Tensor, x_CD: Tensor, groups: Groups) -> Tensor:
        grad_CF, x_CD = grad_CF.to(self.compute_dtype), x_CD.to(self.compute_dtype)
        if self.compute_dtype is torch.float64:
            return _weight_gradient_by_loop(grad_CF, x_CD, groups.host)
        return F.grouped_mm(grad_CF.t(), x_CD, offs=groups.ends_E)


class _GroupedByLoop(torch.autograd.Function):
    """One product per expert into preallocated results. Indexing the stacked weight under autograd instead would write
    a full-size gradient per expert.
    """

    @staticmethod
    def forward(ctx: Any, x_CD: Tensor, w_EFD: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x_CD, w_EFD)
        ctx.counts = groups.host
        y_CF = x_CD.new_empty(x_CD.shape[0], w_EFD.shape[1])
        for x, w, y in zip(x_CD.split(ctx.counts), w_EFD, y_CF.split(ctx.counts), strict=True):
            torch.mm(x, w.t(), out=y)
        return y_CF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_CD, w_EFD = ctx.saved_tensors
        (grad_CF,) = grads
        grad_x = _input_gradient_by_loop(grad_CF, w_EFD, ctx.counts)
        return grad_x, _weight_gradient_by_loop(grad_CF, x_CD, ctx.counts), None


def _input_gradient_by_loop(grad_CF: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
    grad_x = grad_CF.new_empty(grad_CF.shape[0], w_EFD.shape[2])
    for g, w, out in zip(grad_CF.split(counts), w_EFD, grad_x.split(counts), strict=True):
        torch.mm(g, w, out=out)
    return grad_x


def _weight_gradient_by_loop(grad_CF: Tensor, x_CD: Tensor, counts: list[int]) -> Tensor:
    grad_w = grad_CF.new_empty(len(counts), grad_CF.shape[1], x_CD.shape[1])
    for g, x, out in zip(grad_CF.split(counts), x_CD.split(counts), grad_w, strict=True):
        torch.mm(g.t(), x, out=out)
    return grad_w


def _grouped_by_loop(x_CD: Tensor, w_EFD: Tensor, groups: Groups) -> Tensor:
    return _GroupedByLoop.apply(x_CD, w_EFD, groups)
