"""Mixture of experts for one device: route, sort tokens by expert, one grouped product per projection, sum back.

Parallelism replaces `dispatch`; nothing else in this file knows of ranks. No token is dropped, and the cost is flat in
the number of experts at constant active parameters.

Shapes: B batch, T tokens, D model width, E experts, K experts per token, C = T*K routed tokens, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.balance import Balance
from model.config import BalanceConfig, ModelConfig, RouterConfig, Score, WeightsOn
from model.context import SequenceContext
from model.layers import GatedMLP, GroupedGateUp, GroupedLinear
from model.roles import Role
from precision.backend import GemmBackend


@dataclass(frozen=True)
class Choice:
    """Which experts each token goes to, and with what weight."""

    experts_TK: Tensor
    weights_TK: Tensor


class Router(nn.Module):
    """Scores every expert in at least float32 and chooses `top_k` of them; weight [E, D]."""

    def __init__(self, width: int, experts: int, config: RouterConfig, balance: BalanceConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.roles = {"weight": Role.router}
        self.balance = Balance(experts, config.score, balance)

    def forward(self, x_BTD: Tensor, routed_tokens: Tensor | float | None) -> Choice:
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        logits_BTE = F.linear(x_BTD.to(wide), self.weight.to(wide))
        experts_BTK = self._choose(logits_BTE.detach())
        logits_BTE = self.balance(logits_BTE, experts_BTK, routed_tokens)
        weights_BTK = self._scores(logits_BTE).gather(-1, experts_BTK)
        if self.config.renormalise:
            weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdim=True)
        if self.config.scale != 1:
            weights_BTK = weights_BTK * self.config.scale
        return Choice(experts_BTK.flatten(0, 1), weights_BTK.flatten(0, 1))

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.config.score is Score.sigmoid else logits.softmax(-1)

    def _choose(self, logits_BTE: Tensor) -> Tensor:
        """Expert ids [B, T, K], int64. The selection bias moves the choice only, never a weight."""
        if self.config.force_balanced:
            batch, length, experts = logits_BTE.shape
            count = batch * length * self.config.top_k
            return (torch.arange(count, device=logits_BTE.device) % experts).view(batch, length, -1)
        ranking = logits_BTE
        if self.balance.config.bias_rate:
            ranking = self._scores(logits_BTE) + self.balance.bias_E
        return ranking.topk(self.config.top_k, dim=-1).indices


@dataclass(frozen=True)
class Dispatched:
    """Tokens gathered by expert, and what is needed to bring results back."""

    x_CD: Tensor
    counts_E: Tensor
    order_C: Tensor
    """order_C[i] is the routed slot (token * K + k) that row i came from."""
    inverse_C: Tensor

    def restore(self, y_CD: Tensor, top_k: int) -> Tensor:
        """Sum each token's K results: [T, D]."""
        return _Combine.apply(y_CD, self.order_C, self.inverse_C, top_k)


def dispatch(x_TD: Tensor, choice: Choice, experts: int) -> Dispatched:
    """Sort tokens by expert; ties keep the order of tokens."""
    chosen_C = choice.experts_TK.flatten()
    sorted_C, order_C = chosen_C.sort(stable=True)
    inverse_C = torch.empty_like(order_C).scatter_(0, order_C, torch.arange(len(order_C), device=order_C.device))
    bounds_E = torch.searchsorted(sorted_C, torch.arange(experts, device=sorted_C.device), right=True)
    counts_E = bounds_E.diff(prepend=bounds_E.new_zeros(1))
    x_CD = _Gather.apply(x_TD, order_C, inverse_C, choice.experts_TK.shape[1])
    return Dispatched(x_CD, counts_E, order_C, inverse_C)


class _Gather(torch.autograd.Function):
    """Copies of tokens in the order of their experts. Its backward is `_Combine`'s forward: two gathers along a
    permutation, so no addition whose order could differ from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_C: Tensor, inverse_C: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_C)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_C // top_k if top_k > 1 else order_C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_C,) = ctx.saved_tensors
        return _sum_slots(grads[0], inverse_C, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_CD: Tensor, order_C: Tensor, inverse_C: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_C)
        ctx.top_k = top_k
        return _sum_slots(y_CD, inverse_C, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (order_C,) = ctx.saved_tensors
        return grads[0].index_select(0, order_C // ctx.top_k if ctx.top_k > 1 else order_C), None, None, None


def _sum_slots(y_CD: Tensor, inverse_C: Tensor, top_k: int) -> Tensor:
    slots = y_CD.index_select(0, inverse_C)
    return slots if top_k == 1 else slots.unflatten(0, (-1, top_k)).sum(1)


class Experts(nn.Module):
    """E gated MLPs side by side; expert weights are [E, 2, F, D] (gate, then up) and [E, D, F]."""

    def __init__(self, experts: int, width: int, hidden: int, gemm: GemmBackend) -> None:
        super().__init__()
        self.gate_up = GroupedGateUp(experts, width, hidden, Role.expert_gate_up, gemm)
        self.down = GroupedLinear(experts, hidden, width, Role.expert_down, gemm)

    def forward(self, x_CD: Tensor, counts_E: Tensor) -> Tensor:
        gate_CF, up_CF = self.gate_up(x_CD, counts_E)
        return self.down(F.silu(gate_CF) * up_CF, counts_E)


class MixtureOfExperts(nn.Module):
    """Routed experts plus, where it has a width, a shared expert that every token passes through."""

    def __init__(self, model: ModelConfig, gemm: GemmBackend) -> None:
        super().__init__()
        self.config = model.router
        self.router = Router(model.width, model.experts, model.router, model.balance)
        self.experts = Experts(model.experts, model.width, model.expert_width, gemm)
        roles = (Role.shared_gate, Role.shared_up, Role.shared_down)
        hidden = model.shared_expert_width
        self.shared = GatedMLP(model.width, hidden, roles, gemm) if hidden else None

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        choice = self.router(x_BTD, context.routed_tokens)
        x_TD = x_BTD.flatten(0, 1)
        y_TD = self._routed(x_TD, choice)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BTD)

    def _routed(self, x_TD: Tensor, choice: Choice) -> Tensor:
        sent = dispatch(x_TD, choice, self.router.weight.shape[0])
        weights_C1 = choice.weights_TK.flatten().index_select(0, sent.order_C)[:, None].to(x_TD.dtype)
        if self.config.weights_on is WeightsOn.input:
            y_CD = self.experts(sent.x_CD * weights_C1, sent.counts_E)
        else:
            y_CD = self.experts(sent.x_CD, sent.counts_E) * weights_C1
        return sent.restore(y_CD, self.config.top_k)
