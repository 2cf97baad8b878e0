"""Grouped-query attention of iRoPE layers: rotary and chunked, or without positions (NoPE) with query temperature.

Shapes: B batch, T sequence, D hidden size, H query heads, G key/value heads, K head dim, N blocks of a sequence.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from model.attention.plan import AttentionPlan, ForwardContext, blocks
from model.attention.segments import attend_segments
from model.config import LayerConfig, ModelConfig, QKNorm
from model.kernels import kernels_for
from model.kernels.heads import HeadStep, scale_queries, turn
from model.layers import Linear, RMSNorm, joint
from model.roles import Role
from precision.config import AttentionKind
from precision.native_gemm import NativeGemm
from precision.resolve import LayerGemms


class Attend(Protocol):
    """Computes softmax(q k^T / sqrt(K)) v over the keys that each query may attend to: [B, T, H, K]."""

    def __call__(
        self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, context: ForwardContext, chunk: int | None, /
    ) -> Tensor: ...


class Attention(nn.Module):
    """Query, key, value and output projections around `attend`. Query head j uses key/value head j // (H / G).

    Context parallelism replaces `attend`; nothing else in this file depends on ranks.
    """

    def __init__(self, model: ModelConfig, layer: LayerConfig, gemms: LayerGemms) -> None:
        super().__init__()
        self.model, self.layer = model, layer
        self.attend = attend_of(gemms)
        self.kernels = kernels_for(gemms.kernels)
        query_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.query = Linear(model.hidden_size, query_size, Role.query, gemms)
        self.key = Linear(model.hidden_size, kv_size, Role.key, gemms)
        self.value = Linear(model.hidden_size, kv_size, Role.value, gemms)
        self.output = Linear(query_size, model.hidden_size, Role.attention_output, gemms)
        sizes = {QKNorm.per_head: (model.head_dim, model.head_dim), QKNorm.full: (query_size, kv_size)}
        self._has_gains = layer.qk_norm in sizes
        if self._has_gains:
            self.query_norm, self.key_norm = (
                RMSNorm(n, model.norm_eps, Role.qk_norm, gemms) for n in sizes[layer.qk_norm]
            )

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        dtype, chunk = self.query.gemm.compute_dtype, self.layer.attention_chunk_size
        rotation = context.rotation(self.model, self.layer, dtype) if self.layer.rope else None
        temperature = context.temperature(self.model, dtype) if self.layer.temperature else None
        q_BTHK, k_BTGK, v_BTGK = self._heads(x_BTD, context, rotation, temperature)
        if context.cache is not None:
            k_BTGK, v_BTGK = context.cache.extend(self, chunk, k_BTGK, v_BTGK)
        return self.output(self.attend(q_BTHK, k_BTGK, v_BTGK, context, chunk).flatten(-2))

    def _heads(
        self, x_BTD: Tensor, context: ForwardContext, rotation: Tensor | None, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return heads of queries, keys and values as attention takes them."""
        step = self._step()
        if self.kernels.joins:
            if self._joins:
                row_BTX = joint(x_BTD, [self.query, self.key, self.value])
            else:
                row_BTX = torch.cat([x.flatten(-2) for x in self._projections(x_BTD)], -1)
            return self.kernels.heads(row_BTX, step, rotation, temperature)
        if x_BTD.shape[1] > 1:
            q_BTHK, k_BTGK, v_BTGK = self._projections(x_BTD)
            q_BTHK, k_BTGK = (turn(x, step, rotation) for x in (q_BTHK, k_BTGK))
        else:  # in generation the number of operations counts, not that of bytes
            qk_BTHK, v_BTGK = self._joined_projections(x_BTD, context, step)
            q_BTHK, k_BTGK = turn(qk_BTHK, step, rotation).split(step.heads[:2], 2)
        return scale_queries(q_BTHK, step, temperature), k_BTGK, v_BTGK

    def _step(self) -> HeadStep:
        """Return what is done to the heads of this rank between the projections and attention."""
        model = self.model
        heads, groups = (part.weight.shape[0] // model.head_dim for part in (self.query, self.key))
        eps = model.norm_eps if self.layer.qk_norm is QKNorm.weightless else None
        return HeadStep(heads, groups, model.head_dim, model.rope_pairing, eps, model.multipliers.attention)

    @property
    def _joins(self) -> bool:
        return not self._has_gains and all(part.joins for part in (self.query, self.key, self.value))

    def _projections(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return heads of queries, keys and values before rotation. Norms with a gain are applied."""
        heads = (-1, self.model.head_dim)
        q, k = self.query(x_BTD), self.key(x_BTD)
        if self.layer.qk_norm is QKNorm.full:
            q, k = self.query_norm(q), self.key_norm(k)
        q_BTHK, k_BTGK = q.unflatten(-1, heads), k.unflatten(-1, heads)
        if self.layer.qk_norm is QKNorm.per_head:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        return q_BTHK, k_BTGK, self.value(x_BTD).unflatten(-1, heads)

    def _joined_projections(self, x_BTD: Tensor, context: ForwardContext, step: HeadStep) -> tuple[Tensor, Tensor]:
        """Return what `_projections` returns, with heads of queries and keys in one tensor. If the cache keeps matrices
        and no norm comes between, they are multiplied as one.
        """
        if context.cache is not None and self._joins and isinstance(self.query.gemm, NativeGemm):
            weight = context.cache.joined(self, self._joined_weights)
            if weight is not None:
                heads_BTHK = self.query.gemm.linear(x_BTD, weight).unflatten(-1, (-1, self.model.head_dim))
                groups = step.num_kv_heads
                qk_BTHK, v_BTGK = heads_BTHK.split([step.num_heads + groups, groups], 2)
                return qk_BTHK, v_BTGK
        q_BTHK, k_BTGK, v_BTGK = self._projections(x_BTD)
        return torch.cat([q_BTHK, k_BTGK], 2), v_BTGK

    def _joined_weights(self) -> Tensor:
        weights: list[Tensor] = [part.weight for part in (self.query, self.key, self.value)]
        return torch.cat(weights).to(self.query.gemm.compute_dtype)


def attend_of(gemms: LayerGemms) -> Attend:
    """Return how a layer attends on one device."""
    return varlen_attention if gemms.attention is AttentionKind.varlen else local_attention


def varlen_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, context: ForwardContext, chunk: int | None
) -> Tensor:
    """Attend to whole sequences in one call of flash attention, whatever the number of documents and chunks."""
    if context.cache is not None:
        return local_attention(q_BTHK, k_BTGK, v_BTGK, context, chunk)
    ends, longest = context.borders(chunk)
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    grouped = q.shape[1] != k.shape[1]
    y: Any = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    return y.view(q_BTHK.shape)


def local_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, context: ForwardContext, chunk: int | None
) -> Tensor:
    """Attend to a sequence that is entirely on this device."""
    return attend(q_BTHK, k_BTGK, v_BTGK, context.plan(chunk))


def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, plan: AttentionPlan) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v under `plan`: [B, T, H, K]."""
    if plan.segments is not None:
        return attend_segments(q_BTHK, k_BTGK, v_BTGK, plan.segments)
    if plan.block is None:
        return _dot_product(q_BTHK, k_BTGK, v_BTGK, plan.mask, plan.causal)
    q, k, v = (blocks(x, plan.block) for x in (q_BTHK, k_BTGK, v_BTGK))
    if plan.halo:
        k, v = (torch.cat([F.pad(x[:, :-1], (0, 0) * 3 + (1, 0)), x], dim=2) for x in (k, v))
    y = _dot_product(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), plan.mask)
    return y.unflatten(0, q.shape[:2]).flatten(1, 2)[:, : q_BTHK.shape[1]]


def _dot_product(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask: Tensor | None, causal: bool = True) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    grouped = q.shape[1] != k.shape[1]
    is_causal = causal and mask is None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
    return y.transpose(1, 2)
