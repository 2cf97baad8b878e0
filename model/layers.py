"""Linear and GroupedLinear own parameters and their roles; the product belongs to a GEMM backend.

Shapes: T tokens, D input width, F output width, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels
from model.roles import Role
from precision.gemm import GemmBackend, Groups, widened
from precision.resolve import LayerProducts


def _backend(products: LayerProducts, role: Role) -> GemmBackend:
    assert role.products is not None
    return products.of(role.products, role.value)


class Linear(nn.Module):
    """y = x W^T without bias; weight [F, D]."""

    def __init__(self, in_width: int, out_width: int, role: Role, products: LayerProducts) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.roles = {"weight": role}
        self.gemm = _backend(products, role)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.gemm.linear(x_TD, self.weight)


class GroupedLinear(nn.Module):
    """One matrix per expert, weight [E, F, D]; rows come sorted by expert."""

    def __init__(self, experts: int, in_width: int, out_width: int, role: Role, products: LayerProducts) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_width, in_width))
        self.roles = {"weight": role}
        self.gemm = _backend(products, role)

    def forward(self, x_CD: Tensor, groups: Groups) -> Tensor:
        return self.gemm.grouped_linear(x_CD, self.weight, groups)


class GroupedGateUp(nn.Module):
    """Each expert's gate and up matrices in one product; weight [E, 2, F, D].

    Together they cost fewer products and the input is read once. They have an axis of their own: stacked along F they
    could not be sharded by column.
    """

    def __init__(self, experts: int, in_width: int, out_width: int, role: Role, products: LayerProducts) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, 2, out_width, in_width))
        self.roles = {"weight": role}
        self.gemm = _backend(products, role)

    def forward(self, x_CD: Tensor, groups: Groups) -> Tensor:
        """Gate, then up, side by side: [C, 2 * F]."""
        return self.gemm.grouped_linear(x_CD, self.weight.flatten(1, 2), groups)


class Embedding(nn.Module):
    """Rows of a table; weight [V, D]."""

    def __init__(self, vocab_size: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.roles = {"weight": Role.embedding}
        self.dtype = dtype

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight).to(self.dtype)


class TiedHead(nn.Module):
    """y = x W^T with the embedding's table W [V, D]. The parameter stays the embedding's and has its name alone."""

    def __init__(self, table: Embedding, products: LayerProducts) -> None:
        super().__init__()
        self.gemm, self._table = _backend(products, Role.head), (table,)  # in a tuple: no child of this module

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.gemm.linear(x_TD, self._table[0].weight)


class RMSNorm(nn.Module):
    """x / rms(x), normalised in at least float32, cast back, then times the gain (Zhang & Sennrich 2019) and a constant
    `scale`.
    """

    def __init__(self, width: int, eps: float, role: Role, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.roles = {"weight": role}
        self.eps, self.scale = eps, scale

    def forward(self, x: Tensor) -> Tensor:
        y = rms_normalise(x, self.eps) * self.weight.to(x.dtype)
        return y if self.scale == 1 else y * self.scale


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """Weightless RMS norm over the last dimension, in at least float32, returned in the format of `x`."""
    wide = widened(x)
    return F.rms_norm(wide, (x.shape[-1],), None, eps).to(x.dtype)


def swiglu_halves(gate_up_C2F: Tensor) -> Tensor:
    """silu(left half) * right half of each row (Shazeer 2020). Autograd would put the gradients of the two views
    together by copying both; a compiler does better without help.
    """
    if torch.compiler.is_compiling():
        gate_CF, up_CF = gate_up_C2F.chunk(2, dim=-1)
        return F.silu(gate_CF) * up_CF
    return _SwiGLUHalves.apply(gate_up_C2F)


class _SwiGLUHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_C2F: Tensor) -> Tensor:
        gate_CF, up_CF = gate_up_C2F.chunk(2, dim=-1)
        active_CF = F.silu(gate_CF)
        ctx.save_for_backward(gate_up_C2F, active_CF)
        return active_CF * up_CF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up_C2F, active_CF), (grad_CF,) = ctx.saved_tensors, grads
        gate_CF, up_CF = gate_up_C2F.chunk(2, dim=-1)
        found_C2F = torch.empty_like(gate_up_C2F)
        to_gate_CF, to_up_CF = found_C2F.chunk(2, dim=-1)
        torch.mul(grad_CF, active_CF, out=to_up_CF)
        torch.mul(grad_CF, up_CF, out=to_gate_CF)
        torch.ops.aten.silu_backward.grad_input(to_gate_CF, gate_CF, grad_input=to_gate_CF)
        return found_C2F


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense feed-forward layer and the shared expert (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, roles: tuple[Role, Role, Role], products: LayerProducts) -> None:
        super().__init__()
        gate, up, down = roles
        self.gate = Linear(width, hidden, gate, products)
        self.up = Linear(width, hidden, up, products)
        self.down = Linear(hidden, width, down, products)
        self.kernels = kernels.made(products.kernels)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate(x_TD), self.up(x_TD)
        if self.kernels is not None:
            return self.down(self.kernels.swiglu(gate_TF, up_TF))
        return self.down(F.silu(gate_TF) * up_TF)
