"""Deferred gradients of weights, which a zero-bubble schedule computes while a rank would be idle (Qi et al. 2024).

The backward pass of a matmul computes the gradient of its input at once and defers the matmul that gives the gradient
of its weight. The deferred matmuls of one micro-batch are computed when the schedule says so. Nothing else of the
backward pass is deferred, so a layer with activation checkpointing recomputes once, as in any other schedule.
(torch.distributed.pipelining instead splits the backward pass into an input part and a weight part, and each part
repeats the recomputation.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.layers import GroupedGateUp, GroupedLinear, Linear
from parallel.fsdp import GradientSum, gradient_sums
from precision.gemm import GemmBackend, Groups


class Deferred:
    """The deferred matmuls of one stage."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def defer(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)

    def take(self) -> Callable[[], None]:
        """Return a function that computes everything deferred since the last call."""
        taken, self._waiting = self._waiting, []

        def run() -> None:
            while taken:
                taken.pop(0)()  # and free its tensors

        return run


def apply(stack: nn.Module) -> Deferred:
    """Make the matmuls of a stage defer the gradients of their weights."""
    deferred, sums = Deferred(), gradient_sums(stack)
    for module in stack.modules():
        if isinstance(module, Linear | GroupedLinear | GroupedGateUp):
            module.gemm = DeferringProducts(module.gemm, sums[module], deferred)
    return deferred


class DeferringProducts:
    """A GEMM backend for one module that wraps `inner`. It defers weight gradients, which are added to `total`."""

    def __init__(self, inner: GemmBackend, total: GradientSum, deferred: Deferred) -> None:
        self.inner, self.total, self.deferred = inner, total, deferred
        self.compute_dtype, self.token_multiple = inner.compute_dtype, inner.token_multiple
        self.input_gradient, self.weight_gradient = inner.input_gradient, inner.weight_gradient
        self.narrowed = inner.narrowed

    def linear(self, x: Tensor, w: Tensor, groups: Groups | None = None) -> Tensor:
        if torch.is_grad_enabled() and w.requires_grad:
            return _Product.apply(x, w, groups, self)
        return self.inner.linear(x, w, groups)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, groups: Groups | None, products: DeferringProducts) -> Tensor:
        ctx.products, ctx.groups = products, groups
        ctx.save_for_backward(x, w)
        return products.inner.linear(x, w, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        products, inner, groups, grad = ctx.products, ctx.products.inner, ctx.groups, grads[0].contiguous()
        x, w = ctx.saved_tensors

        @torch.no_grad()
        def add_gradient() -> None:
            products.total.add(inner.weight_gradient(grad, x, groups))

        products.deferred.defer(add_gradient)
        return inner.input_gradient(grad, w, groups).to(x.dtype), None, None, None
