"""Keeping the experts' loads even, without leaving a value in any module's return.

The auxiliary loss and the router z-loss enter by gradient injection: the router's logits pass through a function whose
forward changes nothing and whose backward adds the terms' gradients and counts the loads. A backward pass runs once per
micro-batch whatever is recomputed, so everything is counted once.

Shapes: B batch, T sequence, E experts, K experts per token. Every term is a sum over tokens divided by the global
number of tokens of the optimizer step, which is known before the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import AuxScope, BalanceConfig, Score


class RouterBalance(nn.Module):
    """One router's balancing state.

    Persistent, since a resumed run must go on exactly: the selection `bias_E` and last step's global `load_E` (mean 1).
    Not persistent: what this step has counted so far, reset by `step`.
    """

    bias_E: Tensor
    load_E: Tensor
    counts_E: Tensor
    sums: Tensor

    def __init__(self, experts: int, score: Score, config: BalanceConfig) -> None:
        super().__init__()
        self.config, self.score = config, score
        self.whole_rows: Callable[[Tensor], None] = lambda counts_BE: None
        """Sums a row's counts in place over the ranks that hold parts of the same row."""
        self.register_buffer("bias_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.ones(experts))
        self.register_buffer("counts_E", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64), persistent=False)  # aux, z, entropy

    def reset(self) -> None:
        """Give the buffers their first values; `to_empty` leaves them undefined."""
        for buffer in (self.bias_E, self.counts_E, self.sums):
            buffer.zero_()
        self.load_E.fill_(1)

    def forward(self, logits_BTE: Tensor, experts_BTK: Tensor, routed_tokens: Tensor | float | None) -> Tensor:
        """The logits unchanged; their gradient gains the balancing terms' and the loads are counted in backward."""
        if not (torch.is_grad_enabled() and logits_BTE.requires_grad):
            return logits_BTE
        if routed_tokens is None:
            if self.config.aux or self.config.z:
                raise ValueError("balancing terms need SequenceContext.routed_tokens, the step's global token count")
            routed_tokens = float(logits_BTE.shape[0] * logits_BTE.shape[1])
        return _Inject.apply(logits_BTE, experts_BTK, self, routed_tokens)

    @torch.no_grad()
    def step(self, counts_E: Tensor) -> None:
        """Take the step's global counts: freeze them for the next step and move the selection bias."""
        mean = counts_E.double().mean().clamp_min(1)
        self.load_E.copy_(counts_E.double() / mean)
        if self.config.bias_rate:
            delta_E = torch.sign(1 - self.load_E) * self.config.bias_rate
            self.bias_E.add_(delta_E - delta_E.mean())
        self.counts_E.zero_()
        self.sums.zero_()


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, experts: Tensor, balance: RouterBalance, routed_tokens: Tensor | float
    ) -> Tensor:
        ctx.save_for_backward(logits, experts)
        ctx.balance, ctx.routed_tokens = balance, routed_tokens
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_BTE, experts_BTK = ctx.saved_tensors
        balance, (grad_BTE,) = ctx.balance, grads
        counts_BE = count(experts_BTK, logits_BTE.shape[-1])
        balance.counts_E += counts_BE.sum(0)
        divisor = ctx.routed_tokens
        log_p_BTE = logits_BTE.log_softmax(-1)
        lse_BT = logits_BTE.amax(-1) - log_p_BTE.amax(-1)  # as exact as logsumexp, in a fraction of its time
        aux = None
        if balance.config.z:
            grad_BTE = grad_BTE + log_p_BTE.exp() * (2 * balance.config.z / divisor * lse_BT)[..., None]
        if balance.config.aux:
            if balance.config.aux_scope is not AuxScope.whole:
                balance.whole_rows(counts_BE)
            load_BE = _load(counts_BE, balance)
            aux, gradient_BTE = _aux(logits_BTE, load_BE.to(logits_BTE.dtype), balance.score)
            grad_BTE = grad_BTE + gradient_BTE * (balance.config.aux / divisor)
        z, entropy = _dot(lse_BT, lse_BT), _entropy(logits_BTE, log_p_BTE, balance.score)
        balance.sums += torch.stack((torch.zeros_like(z) if aux is None else aux, z, entropy)) / divisor
        return grad_BTE, None, None, None


def count(experts_BTK: Tensor, experts: int) -> Tensor:
    """How often each row chose each expert: int64 [B, E]. Integer additions: the same in any order."""
    chosen = experts_BTK.flatten(1)
    return chosen.new_zeros(chosen.shape[0], experts).scatter_add_(1, chosen, torch.ones_like(chosen))


def _load(counts_BE: Tensor, balance: RouterBalance) -> Tensor:
    """Share of the tokens each expert got, times E (an even load is 1), over the configured scope: [B or 1, E]."""
    if balance.config.aux_scope is AuxScope.whole:
        return balance.load_E[None]
    counts = counts_BE if balance.config.aux_scope is AuxScope.sequence else counts_BE.sum(0, keepdim=True)
    return counts.double() * counts.shape[1] / counts.sum(1, keepdim=True)


def _entropy(logits_BTE: Tensor, log_p_BTE: Tensor, score: Score) -> Tensor:
    """Sum over tokens of the entropy of the normalised scores, over its maximum ln E: how undecided the router is."""
    log_p = log_p_BTE if score is Score.softmax else F.logsigmoid(logits_BTE).log_softmax(-1)
    return _dot(log_p.exp(), log_p) * (-1 / math.log(logits_BTE.shape[-1]))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


def _aux(logits_BTE: Tensor, load_BE: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """Sum over tokens of sum_e load_e p_e, with p the scores normalised to 1, and its gradient by the logits.

    Softmax: dp_e/dz = p_e (1[e=j] - p_j). Sigmoid s: p = s / sum(s) (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).
    """
    load_B1E = load_BE[:, None]
    if score is Score.softmax:
        p = logits_BTE.softmax(-1)
        mean = (p * load_B1E).sum(-1, keepdim=True)
        return mean.sum(), p * (load_B1E - mean)
    s = logits_BTE.sigmoid()
    total = s.sum(-1, keepdim=True)
    mean = (s * load_B1E).sum(-1, keepdim=True) / total
    return mean.sum(), (load_B1E - mean) / total * s * (1 - s)
