"""Mixture of experts for one device: route, sort tokens by expert, do a grouped matmul per projection, and combine.

Expert parallelism replaces `MixtureOfExperts.dispatch`; nothing else in this file depends on ranks. No token is
dropped. With equally many active parameters, more experts cost only the memory traffic of their weights.

Shapes: B batch, T tokens, D hidden size, E experts, K experts per token, S = T*K routed slots, C rows of the experts
(slots, plus padding where the matmuls need it), F expert hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from model.attention.plan import ForwardContext
from model.config import BalanceConfig, ModelConfig, RouterConfig, WeightsOn
from model.kernels import StepKernels, TorchKernels, kernels_for
from model.kernels.moe import SortedSlots
from model.layers import GatedMLP, GroupedGateUp, GroupedLinear, gated_product
from model.load_balance import RouterBalance, in_backward
from model.roles import Role
from model.router_scores import scores
from precision.gemm import Groups, at_least_float32
from precision.native_gemm import NativeGemm
from precision.resolve import LayerGemms


@dataclass(frozen=True)
class TopKRouting:
    """The ids of each token's top-k experts and their routing weights."""

    experts_TK: Tensor
    weights_TK: Tensor


class Router(nn.Module):
    """Scores the experts in at least float32 and selects `top_k`; weight [E, D]."""

    def __init__(self, hidden_size: int, experts: int, config: RouterConfig, balance: BalanceConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.roles = {"weight": Role.router}
        self.balance = RouterBalance(experts, config, balance)
        self._gemms = {dtype: NativeGemm(dtype) for dtype in (torch.float32, torch.float64)}

    def forward(
        self, x_BTD: Tensor, routed_tokens: Tensor | float | None, is_image_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return expert ids, int64, and their routing weights, both [B, T, K]."""
        logits_BTE = self._gemms[at_least_float32(x_BTD.dtype)].linear(x_BTD, self.weight)
        experts_BTK = self._select(logits_BTE.detach())
        logits_BTE = self.balance(logits_BTE, experts_BTK, routed_tokens, is_image_BT)
        weights_BTK = scores(self.config, logits_BTE).gather(-1, experts_BTK)
        if self.config.norm_topk_prob:
            weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdim=True)
        if self.config.scale != 1:
            weights_BTK = weights_BTK * self.config.scale
        return experts_BTK, weights_BTK

    def _select(self, logits_BTE: Tensor) -> Tensor:
        """Return expert ids [B, T, K], int64. The selection bias affects the selection, never a routing weight."""
        if self.config.force_balanced:
            batch, length, experts = logits_BTE.shape
            count = batch * length * self.config.top_k
            return (torch.arange(count, device=logits_BTE.device) % experts).view(batch, length, -1)
        ranking, is_biased = logits_BTE, self.balance.config.bias_rate or self.config.selection_bias
        if is_biased or self.config.groups > 1:
            ranking = scores(self.config, logits_BTE)
        if is_biased:
            ranking = ranking + self.balance.bias_E
        if self.config.groups > 1:
            ranking = in_best_groups(ranking, self.config)
        if self.config.top_k == 1:  # several times faster than topk on a CPU
            return ranking.max(dim=-1, keepdim=True).indices
        return ranking.topk(self.config.top_k, dim=-1).indices


def in_best_groups(ranking_BTE: Tensor, router: RouterConfig) -> Tensor:
    """Return the scores with -inf outside of each token's `top_groups` groups, those in which the two largest scores
    have the largest sums.
    """
    grouped = ranking_BTE.unflatten(-1, (router.groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(router.top_groups, dim=-1).indices
    is_out = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=best.device).scatter_(-1, best, False)
    return grouped.masked_fill(is_out[..., None], -torch.inf).flatten(-2)


T = TypeVar("T")
Result = TypeVar("Result", covariant=True)


class Pending(Protocol[Result]):
    """Something under way. Call it once: it waits for the result and returns it."""

    def __call__(self) -> Result: ...


@dataclass(frozen=True)
class Dispatched:
    """Rows for the experts, sorted by expert, and how to combine the results."""

    x_CD: Tensor
    groups: Groups
    combine: Callable[[Tensor], Callable[[], Pending[Tensor]]]
    """Sums the experts' rows [C, D] per token on this rank. Returns the function that begins to send the sums back, for
    the result of each token [T, D].
    """


class Dispatcher(Protocol):
    """Sends tokens to their experts. Applies routing weights before or after the experts, as `weights_on` says."""

    def __call__(self, x_TD: Tensor, routing: TopKRouting, /) -> Pending[Dispatched]: ...


@dataclass(frozen=True)
class LocalDispatcher:
    """Sorts rows by expert and, within an expert, by token. All experts are on this device."""

    experts: int
    weights_on: WeightsOn
    token_multiple: int = 1
    kernels: StepKernels = field(default_factory=TorchKernels)

    def __call__(self, x_TD: Tensor, routing: TopKRouting) -> Pending[Dispatched]:
        slots = routing.experts_TK
        few = slots.device.type == "cpu" and self.token_multiple == 1 and slots.numel() <= _FEW_SLOTS
        if few and len(slots) == 1 and not torch.is_grad_enabled():
            return dispatch_one_token(x_TD, routing, self.experts, self.weights_on)
        permute = permute_on_host if few else partial(permute_by_expert, multiple=self.token_multiple)
        rows = permute(slots, self.experts)
        x_CD, collect = dispatch_rows(self.kernels, rows, x_TD, routing.weights_TK, self.weights_on)
        return _done(Dispatched(x_CD, rows.groups, lambda y_CD: _done(partial(collect, y_CD))))


_FEW_SLOTS = 64
"""Number of slots up to which Python sorts faster than a dozen tensor operations: in generation, token by token."""


def _done(result: T) -> Callable[[], T]:
    return lambda: result


def dispatch_one_token(x_1D: Tensor, routing: TopKRouting, experts: int, weights_on: WeightsOn) -> Pending[Dispatched]:
    """Dispatch a token on a CPU without gradients, in fewer operations: all rows are the token, times their weights."""
    chosen, weights_1K = routing.experts_TK.tolist()[0], routing.weights_TK.to(x_1D.dtype)
    if len(chosen) > 1:
        order = sorted(range(len(chosen)), key=chosen.__getitem__)
        weights_1K = weights_1K.index_select(1, torch.tensor(order))
    counts = [0] * experts
    for expert in chosen:
        counts[expert] += 1
    groups = Groups(torch.tensor(counts), counts)
    if weights_on is WeightsOn.output:
        rows_KD = x_1D.expand(len(chosen), -1)
        return _done(Dispatched(rows_KD, groups, lambda y_KD: _done(partial(weights_1K.matmul, y_KD))))
    x_KD = x_1D * weights_1K.t()
    add = (lambda y_KD: y_KD) if len(chosen) == 1 else partial(torch.sum, dim=0, keepdim=True)
    return _done(Dispatched(x_KD, groups, lambda y_KD: _done(partial(add, y_KD))))


def permute_on_host(experts_TK: Tensor, experts: int) -> SortedSlots:
    """Sort slots stably by expert id like `permute_by_expert`, for a few slots on a CPU."""
    chosen = experts_TK.flatten().tolist()
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    places, counts = [0] * len(chosen), [0] * experts
    for row, slot in enumerate(order):
        places[slot] = row
        counts[chosen[slot]] += 1
    place_TK = torch.tensor(places).view(experts_TK.shape)
    return SortedSlots(torch.tensor(order), place_TK, Groups(torch.tensor(counts), counts))


def permute_by_expert(experts_TK: Tensor, experts: int, multiple: int = 1) -> SortedSlots:
    """Sort slots stably by expert id (below `experts`) and pad the rows of each expert to a multiple of `multiple`."""
    sorted_S, order_S = experts_TK.flatten().sort(stable=True)
    counts_E = torch.searchsorted(sorted_S, torch.arange(experts + 1, device=sorted_S.device)).diff()
    row_S = torch.arange(len(order_S), device=order_S.device)
    source_C, is_padding_C1 = order_S, None
    if multiple > 1 and len(order_S):  # padding rows point at slot 0, which must exist
        padded_E = (counts_E + multiple - 1) // multiple * multiple
        extra_E = padded_E - counts_E
        row_S = row_S + (extra_E.cumsum(0) - extra_E).index_select(0, sorted_S)
        counts_E, rows = padded_E, len(order_S) + experts * (multiple - 1)
        source_C = order_S.new_zeros(rows).scatter_(0, row_S, order_S)
        is_padding_C1 = torch.ones(rows, 1, dtype=torch.bool, device=order_S.device).index_fill_(0, row_S, False)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, row_S)
    return SortedSlots(source_C, place_S.view(experts_TK.shape), Groups(counts_E), is_padding_C1)


def keep_rows(slots: SortedSlots, count: int, groups: Groups) -> SortedSlots:
    """Keep only the first `count` rows, those of `groups`. The slots of the others have no row then."""
    source_C, place_TK, _, padding = slots[:4]
    padding = None if padding is None else padding[:count]
    return SortedSlots(source_C[:count], place_TK.where(place_TK < count, -1), groups, padding, is_partial=True)


def dispatch_rows(
    kernels: StepKernels, rows: SortedSlots, x_TD: Tensor, weights_TK: Tensor, weights_on: WeightsOn
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Permute tokens to `rows` on this device: [C, D]. Return them, and the function that sums the experts' rows
    [C, D] per token: [T, D].

    Routing weights are applied in token order, so values that the GEMMs leave in padding rows (even NaN) reach neither
    the outputs nor the weights' gradients.
    """
    before, after = (weights_TK, None) if weights_on is WeightsOn.input else (None, weights_TK)
    x_CD = kernels.permute(x_TD, rows, before)
    return x_CD, partial(kernels.unpermute, slots=rows, weights_TK=after)


class Experts(nn.Module):
    """E gated MLPs; weights [E, 2, F, D] (gate, then up) and [E, D, F]."""

    def __init__(self, experts: int, hidden_size: int, expert_hidden_size: int, gemms: LayerGemms) -> None:
        super().__init__()
        self.gate_up = GroupedGateUp(experts, hidden_size, expert_hidden_size, Role.expert_gate_up, gemms)
        self.down = GroupedLinear(experts, expert_hidden_size, hidden_size, Role.expert_down, gemms)
        self.kernels = kernels_for(gemms.kernels)

    @property
    def token_multiple(self) -> int:
        """Each expert's rows are padded to a multiple of this."""
        return self.down.gemm.token_multiple

    def forward(self, x_CD: Tensor, groups: Groups) -> Tensor:
        return gated_product(self.gate_up(x_CD, groups), self.down, self.kernels, groups)


class MixtureOfExperts(nn.Module):
    """Routed experts plus, if its hidden size is not 0, a shared expert that processes every token.

    The halves of the shared expert run while tokens travel to the routed experts and while results travel back. The
    backward pass runs in the opposite order, so they overlap there too.
    """

    def __init__(self, model: ModelConfig, gemms: LayerGemms) -> None:
        super().__init__()
        self.router = Router(model.hidden_size, model.num_experts, model.router, model.balance)
        self.multiplier = model.multipliers.gates
        self.experts = Experts(model.num_experts, model.hidden_size, model.expert_hidden_size, gemms)
        weights_on, multiple = model.router.weights_on, self.experts.token_multiple
        self.dispatch: Dispatcher = LocalDispatcher(model.num_experts, weights_on, multiple, self.experts.kernels)
        roles = (Role.shared_gate, Role.shared_up, Role.shared_down)
        hidden = model.shared_hidden_size
        self.shared = GatedMLP(model.hidden_size, hidden, roles, gemms) if hidden else None

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        experts_BTK, weights_BTK = self.router(x_BTD, context.routed_tokens, context.is_image_BT)
        x_TD = x_BTD.flatten(0, 1)
        arrived = self.dispatch(x_TD, TopKRouting(experts_BTK.flatten(0, 1), weights_BTK.flatten(0, 1)))
        inner_TF = None if self.shared is None else self.shared.first_half(x_TD)
        rows = arrived()
        send_back, is_again = rows.combine(self.experts(rows.x_CD, rows.groups)), in_backward()
        # recomputation ends with the last tensor that is saved: let that be before results are sent once more
        shared_TD = self._second_half(inner_TF) if is_again else None
        combined = send_back()
        if not is_again:
            shared_TD = self._second_half(inner_TF)
        y_TD = combined()
        if self.multiplier != 1:
            y_TD = y_TD * self.multiplier
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD.view_as(x_BTD)

    def _second_half(self, inner_TF: Tensor | None) -> Tensor | None:
        return None if self.shared is None or inner_TF is None else self.shared.second_half(inner_TF)
