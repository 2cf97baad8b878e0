"""Grouped-query attention of iRoPE layers: rotary and chunked, or without positions (NoPE) with query temperature.

Shapes: B batch, T sequence, D hidden size, H query heads, G key/value heads, K head dim, N blocks of a sequence.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.plan import AttentionPlan, ForwardContext, blocks
from model.attention.rope import rotate
from model.attention.segments import attend_segments
from model.config import LayerConfig, ModelConfig, QKNorm
from model.layers import Linear, RMSNorm, rms_normalise
from model.roles import Role
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
        self.attend: Attend = local_attention
        query_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.query = Linear(model.hidden_size, query_size, Role.query, gemms)
        self.key = Linear(model.hidden_size, kv_size, Role.key, gemms)
        self.value = Linear(model.hidden_size, kv_size, Role.value, gemms)
        self.output = Linear(query_size, model.hidden_size, Role.attention_output, gemms)
        plain = all(isinstance(part.gemm, NativeGemm) for part in (self.query, self.key, self.value))
        self._joins = plain and layer.qk_norm in (QKNorm.none, QKNorm.weightless)
        sizes = {QKNorm.per_head: (model.head_dim, model.head_dim), QKNorm.full: (query_size, kv_size)}
        if layer.qk_norm in sizes:
            self.query_norm, self.key_norm = (RMSNorm(n, model.norm_eps, Role.qk_norm) for n in sizes[layer.qk_norm])

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        if x_BTD.shape[1] > 1:
            q_BTHK, k_BTGK, v_BTGK = self._projections(x_BTD)
            q_BTHK, k_BTGK = (self._turn(x, context) for x in (q_BTHK, k_BTGK))
        else:  # in generation the number of operations counts, not that of bytes
            qk_BTHK, v_BTGK = self._joined_projections(x_BTD, context)
            sizes = [qk_BTHK.shape[2] - v_BTGK.shape[2], v_BTGK.shape[2]]
            q_BTHK, k_BTGK = self._turn(qk_BTHK, context).split(sizes, 2)
        if self.model.multipliers.attention != 1:
            q_BTHK = q_BTHK * self.model.multipliers.attention
        if self.layer.temperature:
            q_BTHK = (q_BTHK * context.temperature(self.model, q_BTHK.dtype)).to(q_BTHK.dtype)
        if context.cache is not None:
            k_BTGK, v_BTGK = context.cache.extend(self, self.layer.attention_chunk_size, k_BTGK, v_BTGK)
        y_BTHK = self.attend(q_BTHK, k_BTGK, v_BTGK, context, self.layer.attention_chunk_size)
        return self.output(y_BTHK.flatten(-2))

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

    def _joined_projections(self, x_BTD: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Return what `_projections` returns, with heads of queries and keys in one tensor. If the cache keeps matrices
        and no norm comes between, they are multiplied as one.
        """
        if context.cache is not None and self._joins:
            weight = context.cache.joined(self, self._joined_weights)
            if weight is not None:
                heads_BTHK = self.query.gemm.linear(x_BTD, weight).unflatten(-1, (-1, self.model.head_dim))
                groups = self.model.num_kv_heads
                qk_BTHK, v_BTGK = heads_BTHK.split([self.model.num_heads + groups, groups], 2)
                return qk_BTHK, v_BTGK
        q_BTHK, k_BTGK, v_BTGK = self._projections(x_BTD)
        return torch.cat([q_BTHK, k_BTGK], 2), v_BTGK

    def _joined_weights(self) -> Tensor:
        weights: list[Tensor] = [part.weight for part in (self.query, self.key, self.value)]
        return torch.cat(weights).to(self.query.gemm.compute_dtype)

    def _turn(self, x_BTHK: Tensor, context: ForwardContext) -> Tensor:
        """Rotate heads of queries or keys by their positions, and normalise them without a gain, as the layer says."""
        if self.layer.rope:
            rotation = context.rotation(self.model, self.layer, x_BTHK.dtype)
            x_BTHK = rotate(x_BTHK, rotation, self.model.rope_pairing)
        return rms_normalise(x_BTHK, self.model.norm_eps) if self.layer.qk_norm is QKNorm.weightless else x_BTHK


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
