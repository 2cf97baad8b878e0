"""Plain products of PyTorch in bfloat16, float32 or float64.

Shapes: T tokens, D input width, F output width, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class PlainProducts:
    """Casts both sides to the compute format and multiplies. With fp32 weights and bf16 products the cast is part of
    the graph, so gradients reach the fp32 master weights and accumulate there.
    """

    token_multiple = 1

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self.compute_dtype = compute_dtype

    def linear(self, x_TD: Tensor, w_FD: Tensor) -> Tensor:
        return F.linear(x_TD.to(self.compute_dtype), w_FD.to(self.compute_dtype))

    def grouped_linear(self, x_CD: Tensor, w_EFD: Tensor, counts_E: Tensor) -> Tensor:
        x_CD, w_EFD = x_CD.to(self.compute_dtype), w_EFD.to(self.compute_dtype)
        if self.compute_dtype is torch.float64:  # F.grouped_mm has no float64 kernel
            return _grouped_by_loop(x_CD, w_EFD, counts_E)
        return F.grouped_mm(x_CD, w_EFD.transpose(-2, -1), offs=counts_E.cumsum(0).to(torch.int32))


class _GroupedByLoop(torch.autograd.Function):
    """One product per expert into preallocated results. Indexing the stacked weight under autograd instead would write
    a full-size gradient per expert.
    """

    @staticmethod
    def forward(ctx: Any, x_CD: Tensor, w_EFD: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_CD, w_EFD)
        ctx.counts = counts_E.tolist()
        y_CF = x_CD.new_empty(x_CD.shape[0], w_EFD.shape[1])
        for x, w, y in zip(x_CD.split(ctx.counts), w_EFD, y_CF.split(ctx.counts), strict=True):
            torch.mm(x, w.t(), out=y)
        return y_CF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_CD, w_EFD = ctx.saved_tensors
        (grad_CF,) = grads
        grad_x, grad_w = torch.empty_like(x_CD), torch.empty_like(w_EFD)
        parts = zip(
            x_CD.split(ctx.counts), w_EFD, grad_CF.split(ctx.counts), grad_x.split(ctx.counts), grad_w, strict=True
        )
        for x, w, g, out_x, out_w in parts:
            torch.mm(g, w, out=out_x)
            torch.mm(g.t(), x, out=out_w)
        return grad_x, grad_w, None


def _grouped_by_loop(x_CD: Tensor, w_EFD: Tensor, counts_E: Tensor) -> Tensor:
    return _GroupedByLoop.apply(x_CD, w_EFD, counts_E)
