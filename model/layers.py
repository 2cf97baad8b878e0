"""Layers. Each owns its parameters and their roles; a GEMM backend computes its matmuls.

Shapes: T tokens, D input size, F output size, E experts, C routed tokens (sorted by expert).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import kernels_for
from model.roles import Role
from precision.config import Products
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
        return isinstance(self.gemm, NativeGemm)


class Linear(_Projection):
    """y = x W^T without bias; weight [F, D]."""

    def __init__(self, in_size: int, out_size: int, role: Role, gemms: LayerGemms) -> None:
        super().__init__((out_size, in_size), role, gemms)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.gemm.linear(x_TD, self.weight)


def joint(x_TD: Tensor, parts: Sequence[Linear]) -> Tensor:
    """Return the results of several layers, concatenated, as one matmul that reads the input once. All have the same
    backend of plain matmuls.
    """
    gemm = parts[0].gemm
    assert isinstance(gemm, NativeGemm)
    return gemm.linear(x_TD, gemm.copies.joint([part.weight for part in parts]))


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


class Embedding(nn.Module):
    """Token embeddings; weight [V, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.roles = {"weight": Role.embedding}
        self.dtype = dtype

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight).to(self.dtype)


class TiedHead(nn.Module):
    """y = x W^T with the embedding's weight W [V, D], which is a parameter of the embedding only."""

    def __init__(self, table: Embedding, gemms: LayerGemms) -> None:
        super().__init__()
        self.gemm = gemms.of(Products.head, Role.head.value)
        self._table = (table,)  # in a tuple it does not become a submodule

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.gemm.linear(x_TD, self._table[0].weight)


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
        if self.kernels.joins and self.gate.joins:
            return self.down(self.kernels.swiglu_halves(joint(x_TD, [self.gate, self.up])))
        return self.down(self.kernels.swiglu(self.gate(x_TD), self.up(x_TD)))
