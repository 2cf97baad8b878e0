"""Gradients of weights that wait: what a zero-bubble schedule does in the gaps of its pipeline (Qi et al. 2024).

The backward of a matrix product computes the gradient of its input at once and notes down the other product, which
gives the gradient of its weight. What was noted during one micro-batch's backward pass is computed when the schedule
says so. Nothing else of the backward pass is put off, so a layer that recomputes its activations does so once, as in
any other schedule. (Cutting the autograd graph in two instead, as torch.distributed.pipelining does by itself, repeats
the recomputation for every part: eight forward passes of a layer were counted where two are needed.)

Shapes: T tokens, D input width, F output width, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.layers import GroupedGateUp, GroupedLinear, Linear
from parallel.fsdp import GradientSum, gradient_sums
from precision.gemm import GemmBackend, Groups


class Deferred:
    """What one stage's products have noted down; `take` gives it as one piece of work."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def note(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)

    def take(self) -> Callable[[], None]:
        """Everything noted since the last call."""
        taken, self._waiting = self._waiting, []

        def run() -> None:
            while taken:
                taken.pop(0)()  # and let go of its tensors

        return run


def apply(stack: nn.Module) -> Deferred:
    """Let the products of a stage note their weights' gradients down."""
    deferred, sums = Deferred(), gradient_sums(stack)
    for module in stack.modules():
        if isinstance(module, Linear | GroupedLinear | GroupedGateUp):
            module.gemm = DeferringProducts(module.gemm, sums[module], deferred)
    return deferred


class DeferringProducts:
    """A GEMM backend around another one, for one module and its one weight, whose gradients go to `total`."""

    def __init__(self, inner: GemmBackend, total: GradientSum, deferred: Deferred) -> None:
        self.inner, self.total, self.deferred = inner, total, deferred
        self.compute_dtype, self.token_multiple = inner.compute_dtype, inner.token_multiple

    def linear(self, x_TD: Tensor, w_FD: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.inner.linear(x_TD, w_FD)
        return _Product.apply(x_TD, w_FD, None, self)

    def grouped_linear(self, x_CD: Tensor, w_EFD: Tensor, groups: Groups) -> Tensor:
        if not torch.is_grad_enabled():
            return self.inner.grouped_linear(x_CD, w_EFD, groups)
        return _Product.apply(x_CD, w_EFD, groups, self)

    def input_gradient(self, grad_TF: Tensor, w_FD: Tensor) -> Tensor:
        return self.inner.input_gradient(grad_TF, w_FD)

    def weight_gradient(self, grad_TF: Tensor, x_TD: Tensor) -> Tensor:
        return self.inner.weight_gradient(grad_TF, x_TD)

    def grouped_input_gradient(self, grad_CF: Tensor, w_EFD: Tensor, groups: Groups) -> Tensor:
        return self.inner.grouped_input_gradient(grad_CF, w_EFD, groups)

    def grouped_weight_gradient(self, grad_CF: Tensor, x_CD: Tensor, groups: Groups) -> Tensor:
        return self.inner.grouped_weight_gradient(grad_CF, x_CD, groups)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, groups: Groups | None, products: DeferringProducts) -> Tensor:
        ctx.products, ctx.groups = products, () if groups is None else (groups,)
        ctx.save_for_backward(x, w)
        inner = products.inner
        return inner.linear(x, w) if groups is None else inner.grouped_linear(x, w, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        products, inner, grad = ctx.products, ctx.products.inner, grads[0].contiguous()
        x, w = ctx.saved_tensors
        give = inner.grouped_input_gradient if ctx.groups else inner.input_gradient
        later = inner.grouped_weight_gradient if ctx.groups else inner.weight_gradient
        products.deferred.note(partial(_later, products, later, grad, x, ctx.groups))
        return give(grad, w, *ctx.groups).to(x.dtype), None, None, None


@torch.no_grad()
def _later(
    products: DeferringProducts, product: Callable[..., Tensor], grad: Tensor, x: Tensor, groups: tuple[Groups, ...]
) -> None:
    products.total.add(product(grad, x, *groups))
