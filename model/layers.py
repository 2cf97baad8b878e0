"""Layers. Each owns its parameters and their roles; a GEMM backend computes its matmuls.

Shapes: T tokens, D input size, F output size, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import StepKernels, kernels_for
from model.roles import Role
from precision.fp8_linear import Float8Gemm
from precision.gemm import Groups
from precision.native_gemm import NativeGemm
from precision.resolve import LayerGemms


class _Projection(nn.Module):
    """Owns a weight of shape `shape` and the backend that computes its matmul."""

    def __init__(self, shape: tuple[int, ...], role: Role, gemms: LayerGemms) -> None:
        super().__init__()
        assert role.products is not None
        self.weight = nn.Parameter(torch.empty(shape))
        self.roles = {"weight": role}
        self.gemm = gemms.of(role.products, role.value)

    @property
    def joins(self) -> bool:
        """Whether its matmul may be computed jointly with others: see `joint`."""
        return isinstance(self.gemm, NativeGemm | Float8Gemm)


class Linear(_Projection):
    """y = x W^T without bias; weight [F, D]."""

    def __init__(self, in_size: int, out_size: int, role: Role, gemms: LayerGemms) -> None:
        super().__init__((out_size, in_size), role, gemms)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.gemm.linear(x_TD, self.weight)


def joint(x_TD: Tensor, parts: Sequence[Linear]) -> Tensor:
    """Return the results of several layers, concatenated, as one matmul that reads the input once. All have backends of
    the same kind.
    """
    gemm = parts[0].gemm
    assert isinstance(gemm, NativeGemm | Float8Gemm)
    return gemm.joint(x_TD, [part.weight for part in parts])


class GroupedLinear(_Projection):
    """y = x W_e^T for the rows of each expert e; weight [E, F, D]. Rows are sorted by expert."""

    def __init__(self, experts: int, in_size: int, out_size: int, role: Role, gemms: LayerGemms) -> None:
        super().__init__((experts, out_size, in_size), role, gemms)

    def forward(self, x_CD: Tensor, groups: Groups) -> Tensor:
        return self.gemm.linear(x_CD, self.weight, groups)


class GroupedGateUp(_Projection):
    """Gate and up matrices of each expert in one matmul, which reads the input once; weight [E, 2, F, D].

    Gate and up are stacked along their own dimension, because a weight stacked along F could not be sharded along F.
    """

    def __init__(self, experts: int, in_size: int, out_size: int, role: Role, gemms: LayerGemms) -> None:
        super().__init__((experts, 2, out_size, in_size), role, gemms)

    def forward(self, x_CD: Tensor, groups: Groups) -> Tensor:
        """Return gate and up, concatenated: [C, 2 * F]."""
        return self.gemm.linear(x_CD, self.weight.flatten(1, 2), groups)


def gated_product(gate_up: Tensor, down: _Projection, kernels: StepKernels, groups: Groups | None = None) -> Tensor:
    """Return `down` of the SwiGLU of the two halves of each row. Where plain matmuls are joined, only `gate_up` is
    saved, and the backward pass computes the SwiGLU again, which costs less than its memory.
    """
    if not (kernels.joins and isinstance(down.gemm, NativeGemm) and torch.is_grad_enabled()):
        return down.gemm.linear(kernels.swiglu_halves(gate_up), down.weight, groups)
    flat = gate_up.flatten(0, -2)
    y: Tensor = _GatedProduct.apply(flat, down.gemm.copies.narrow(down.weight), groups, down.gemm, kernels)
    return y if gate_up.dim() == 2 else y.unflatten(0, gate_up.shape[:-1])  # FSDP2 warns about units that return views


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, w: Tensor, groups: Groups | None, gemm: NativeGemm, kernels: StepKernels
    ) -> Tensor:
        ctx.save_for_backward(gate_up, w)
        ctx.groups, ctx.gemm, ctx.kernels = groups, gemm, kernels
        return gemm.linear(kernels.swiglu_forward(*gate_up.chunk(2, -1))[0], w, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        gate_up, w = ctx.saved_tensors
        groups, gemm, kernels, grad = ctx.groups, ctx.gemm, ctx.kernels, grads[0].contiguous()
        halves = gate_up.chunk(2, -1)
        inner, silu = kernels.swiglu_forward(*halves)
        grad_w = gemm.weight_gradient(grad, inner, groups) if ctx.needs_input_grad[1] else None
        del inner
        result = torch.empty_like(gate_up)
        kernels.swiglu_backward(gemm.input_gradient(grad, w, groups), (silu, *halves), result.chunk(2, -1))
        return result, grad_w, None, None, None


class Embedding(nn.Module):
    """Token embeddings; weight [V, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.roles = {"weight": Role.embedding}
        self.dtype = dtype

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight).to(self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) in at least float32, times the gain (Zhang & Sennrich 2019) and a constant `scale`."""

    def __init__(self, size: int, eps: float, role: Role, gemms: LayerGemms, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.roles = {"weight": role}
        self.eps, self.scale, self.kernels = eps, scale, kernels_for(gemms.kernels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.kernels.rms_norm(x, self.weight, self.eps)
        return y if self.scale == 1 else y * self.scale


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020): the dense feed-forward layer and the shared expert."""

    def __init__(self, hidden_size: int, inner_size: int, roles: tuple[Role, Role, Role], gemms: LayerGemms) -> None:
        super().__init__()
        gate, up, down = roles
        self.gate = Linear(hidden_size, inner_size, gate, gemms)
        self.up = Linear(hidden_size, inner_size, up, gemms)
        self.down = Linear(inner_size, hidden_size, down, gemms)
        self.kernels = kernels_for(gemms.kernels)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.second_half(self.first_half(x_TD))

    def first_half(self, x_TD: Tensor) -> Tensor:
        """Return what `second_half` takes. An MoE layer runs the halves apart, each beside an exchange of tokens."""
        if self._joined:
            return self.gate_and_up(x_TD)
        return self.kernels.swiglu(self.gate(x_TD), self.up(x_TD))

    def second_half(self, inner_TF: Tensor) -> Tensor:
        if self._joined:
            return gated_product(inner_TF, self.down, self.kernels)
        return self.down(inner_TF)

    @property
    def _joined(self) -> bool:
        return self.kernels.joins and self.gate.joins

    def gate_and_up(self, x_TD: Tensor) -> Tensor:
        return joint(x_TD, [self.gate, self.up])
