"""Mixture of experts for one device: route, sort tokens by expert, one grouped product per projection, sum back.

Parallelism replaces `dispatch`; nothing else in this file knows of ranks. No token is dropped, and the cost is flat in
the number of experts at constant active parameters.

Shapes: B batch, T tokens, D model width, E experts, K experts per token, S = T*K routed slots, C rows that the experts
see (the slots, with padding where the products need it), F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model import kernels
from model.attention.plan import SequenceContext
from model.config import BalanceConfig, ModelConfig, RouterConfig, Score, WeightsOn
from model.kernels import MoEKernels, SortedSlots
from model.layers import GatedMLP, GroupedGateUp, GroupedLinear, swiglu_halves
from model.load_balance import RouterBalance
from model.roles import Role
from precision.gemm import Groups, at_least_float32
from precision.native_gemm import PlainProducts
from precision.resolve import LayerProducts


@dataclass(frozen=True)
class TopKRouting:
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
        self.balance = RouterBalance(experts, config.score, balance)

    def forward(self, x_BTD: Tensor, routed_tokens: Tensor | float | None) -> tuple[Tensor, Tensor]:
        """Expert ids, int64, and their weights, both [B, T, K]."""
        wide = at_least_float32(x_BTD.dtype)
        logits_BTE = PlainProducts(wide).linear(x_BTD, self.weight)
        experts_BTK = self._choose(logits_BTE.detach())
        logits_BTE = self.balance(logits_BTE, experts_BTK, routed_tokens)
        weights_BTK = self._scores(logits_BTE).gather(-1, experts_BTK)
        if self.config.norm_topk_prob:
            weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdim=True)
        if self.config.scale != 1:
            weights_BTK = weights_BTK * self.config.scale
        return experts_BTK, weights_BTK

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
        if self.config.top_k == 1:  # a fraction of the time, on a CPU
            return ranking.max(dim=-1, keepdim=True).indices
        return ranking.topk(self.config.top_k, dim=-1).indices


@dataclass(frozen=True)
class Dispatched:
    """Rows for the experts, sorted by expert, and the way back."""

    x_CD: Tensor
    groups: Groups
    restore: Callable[[Tensor], Tensor]
    """The experts' rows [C, D] to the sum of each token's results [T, D]."""


class Dispatcher(Protocol):
    """Tokens to experts and back, the routing weights applied on the way that the configuration says."""

    def __call__(self, x_TD: Tensor, choice: TopKRouting) -> Dispatched: ...


@dataclass(frozen=True)
class LocalDispatcher:
    """All experts are here. No token is sent anywhere; rows are sorted by expert, ties keep the order of tokens."""

    experts: int
    weights_on: WeightsOn
    token_multiple: int = 1
    kernels: MoEKernels | None = None

    def __call__(self, x_TD: Tensor, choice: TopKRouting) -> Dispatched:
        rows = permute_by_expert(choice.experts_TK, self.experts, self.token_multiple, self.kernels)
        return Dispatched(*weighted(rows, x_TD, choice.weights_TK, self.weights_on))


@dataclass(frozen=True)
class SortedTokens:
    """The places of T*K routed slots among rows that are sorted by group, each group padded to a multiple."""

    source_C: Tensor
    """Which slot (token * K + k) each row holds; padding, which is zero, names some slot."""
    place_S: Tensor
    """Which row holds each slot."""
    groups: Groups
    """Rows of each group with their padding."""
    is_padding_C1: Tensor | None
    """Which rows are padding; None: none is."""
    kernels: MoEKernels | None = None
    """Who moves the rows; None: plain code."""

    def gather(self, x_TD: Tensor, top_k: int = 1) -> Tensor:
        """Copies of tokens with `top_k` slots each, a row for each slot: [C, D]."""
        if self.kernels is not None:
            return self.kernels.permute(x_TD, self.places(top_k))
        return _GatherTokens.apply(x_TD, self, top_k)

    def combine(self, y_CD: Tensor, top_k: int = 1) -> Tensor:
        """The sum of each token's `top_k` rows: [T, D]."""
        if self.kernels is not None:
            return self.kernels.unpermute(y_CD, self.places(top_k))
        return _Combine.apply(y_CD, self, top_k)

    def places(self, top_k: int) -> SortedSlots:
        return SortedSlots(self.source_C, self.place_S.view(-1, top_k), self.is_padding_C1)

    def copy_slots(self, x_TD: Tensor, top_k: int) -> Tensor:
        source = self.source_C // top_k if top_k > 1 else self.source_C
        x_CD = x_TD.index_select(0, source)
        return x_CD if self.is_padding_C1 is None else x_CD.masked_fill_(self.is_padding_C1, 0)

    def sum_slots(self, y_CD: Tensor, top_k: int) -> Tensor:
        slots = y_CD.index_select(0, self.place_S)
        return slots if top_k == 1 else slots.unflatten(0, (-1, top_k)).sum(1)


def permute_by_expert(
    groups_TK: Tensor, groups: int, multiple: int = 1, kernels: MoEKernels | None = None
) -> SortedTokens:
    """Sort slots by group (ids below `groups`), stably, and pad each group's rows to a multiple."""
    sorted_S, order_S = groups_TK.flatten().sort(stable=True)
    counts_E = torch.searchsorted(sorted_S, torch.arange(groups + 1, device=sorted_S.device)).diff()
    row_S = torch.arange(len(order_S), device=order_S.device)
    source_C, is_padding_C1 = order_S, None
    if multiple > 1 and len(order_S):  # without a slot there is nothing that padding could name
        padded_E = (counts_E + multiple - 1) // multiple * multiple
        extra_E = padded_E - counts_E
        row_S = row_S + (extra_E.cumsum(0) - extra_E).index_select(0, sorted_S)
        counts_E, rows = padded_E, len(order_S) + groups * (multiple - 1)
        source_C = order_S.new_zeros(rows).scatter_(0, row_S, order_S)
        is_padding_C1 = torch.ones(rows, 1, dtype=torch.bool, device=order_S.device).index_fill_(0, row_S, False)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, row_S)
    return SortedTokens(source_C, place_S, Groups(counts_E), is_padding_C1, kernels)


def weighted(
    rows: SortedTokens, x_TD: Tensor, weights_TK: Tensor, weights_on: WeightsOn
) -> tuple[Tensor, Groups, Callable[[Tensor], Tensor]]:
    """What `Dispatched` holds, where slots stay on this device: rows, counts, and the way back.

    Weights are applied in the order of tokens: what the products leave in padding, which may be anything, never meets
    a weight or its gradient.
    """
    top_k, weights_TK1 = weights_TK.shape[1], weights_TK.to(x_TD.dtype)[..., None]
    if rows.kernels is not None:
        places = rows.places(top_k)
        before, after = (weights_TK, None) if weights_on is WeightsOn.input else (None, weights_TK)
        x_CD = rows.kernels.permute(x_TD, places, before)
        return x_CD, rows.groups, partial(rows.kernels.unpermute, places=places, weights_TK=after)
    if weights_on is WeightsOn.input:
        x_SD = (x_TD[:, None] * weights_TK1).flatten(0, 1)
        return rows.gather(x_SD), rows.groups, lambda y_CD: rows.combine(y_CD, top_k)

    def restore(y_CD: Tensor) -> Tensor:
        y_TKD = rows.combine(y_CD).unflatten(0, (-1, top_k)) * weights_TK1
        return y_TKD.squeeze(1) if top_k == 1 else y_TKD.sum(1)

    return rows.gather(x_TD, top_k), rows.groups, restore


class _GatherTokens(torch.autograd.Function):
    """Its backward is `_Combine`'s forward: two gathers along a permutation, so no addition whose order could differ
    from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: SortedTokens, top_k: int) -> Tensor:
        ctx.rows, ctx.top_k = rows, top_k
        return rows.copy_slots(x_TD, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rows.sum_slots(grads[0], ctx.top_k), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_CD: Tensor, rows: SortedTokens, top_k: int) -> Tensor:
        ctx.rows, ctx.top_k = rows, top_k
        return rows.sum_slots(y_CD, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rows.copy_slots(grads[0], ctx.top_k), None, None


class Experts(nn.Module):
    """E gated MLPs side by side; expert weights are [E, 2, F, D] (gate, then up) and [E, D, F]."""

    def __init__(self, experts: int, width: int, hidden: int, products: LayerProducts) -> None:
        super().__init__()
        self.gate_up = GroupedGateUp(experts, width, hidden, Role.expert_gate_up, products)
        self.down = GroupedLinear(experts, hidden, width, Role.expert_down, products)
        self.kernels = kernels.made(products.kernels)

    @property
    def token_multiple(self) -> int:
        """To what each expert's rows are padded."""
        return self.down.gemm.token_multiple

    def forward(self, x_CD: Tensor, groups: Groups) -> Tensor:
        both_C2F = self.gate_up(x_CD, groups)
        if self.kernels is not None:
            return self.down(self.kernels.swiglu_halves(both_C2F), groups)
        return self.down(swiglu_halves(both_C2F), groups)


class MixtureOfExperts(nn.Module):
    """Routed experts plus, where it has a width, a shared expert that every token passes through."""

    def __init__(self, model: ModelConfig, products: LayerProducts) -> None:
        super().__init__()
        self.router = Router(model.hidden_size, model.num_experts, model.router, model.balance)
        self.multiplier = model.multipliers.gates
        self.experts = Experts(model.num_experts, model.hidden_size, model.expert_hidden_size, products)
        weights_on, multiple = model.router.weights_on, self.experts.token_multiple
        self.dispatch: Dispatcher = LocalDispatcher(model.num_experts, weights_on, multiple, self.experts.kernels)
        roles = (Role.shared_gate, Role.shared_up, Role.shared_down)
        hidden = model.shared_hidden_size
        self.shared = GatedMLP(model.hidden_size, hidden, roles, products) if hidden else None

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        experts_BTK, weights_BTK = self.router(x_BTD, context.routed_tokens)
        x_TD = x_BTD.flatten(0, 1)
        sent = self.dispatch(x_TD, TopKRouting(experts_BTK.flatten(0, 1), weights_BTK.flatten(0, 1)))
        y_TD = sent.restore(self.experts(sent.x_CD, sent.groups))
        if self.multiplier != 1:
            y_TD = y_TD * self.multiplier
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BTD)
