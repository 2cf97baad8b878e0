"""Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): queries, keys and values from low-rank projections.

Values are padded with zeros to the width of queries and keys, so that all that `attend` stands for (flash attention,
segments, context parallelism, the cache) has one width. It costs K / V times the products of probabilities and values.

Shapes: B batch, T sequence, D hidden size, H heads, K head dim of queries and keys, R their rotated part, N = K - R,
V head dim of values, L rank of the latent vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.layer import attend_of
from model.attention.plan import ForwardContext
from model.attention.rope import rotate
from model.config import LatentConfig, LayerConfig, ModelConfig
from model.kernels.heads import HeadStep, scale_queries
from model.layers import Linear, RMSNorm
from model.roles import Role
from precision.resolve import LayerGemms

_NORM_EPS = 1e-6
"""The published models have this, whatever their `rms_norm_eps`."""


class LatentAttention(nn.Module):
    """Projections of latent attention around `attend`. Tensor parallelism splits `query` or `query_up`, `latent_up` and
    `output` by heads; the projections down are whole on every rank.

    Context parallelism replaces `attend`; nothing else in this file depends on ranks.
    """

    def __init__(self, model: ModelConfig, layer: LayerConfig, gemms: LayerGemms) -> None:
        super().__init__()
        assert model.latent is not None
        self.model, self.layer = model, layer
        self.latent: LatentConfig = model.latent
        self.attend = attend_of(gemms)
        latent, width = self.latent, model.hidden_size
        queries = model.num_heads * model.head_dim
        if latent.query_rank is None:
            self.query = Linear(width, queries, Role.query, gemms)
        else:
            self.query_down = Linear(width, latent.query_rank, Role.query_down, gemms)
            self.query_norm = RMSNorm(latent.query_rank, _NORM_EPS, Role.latent_norm, gemms)
            self.query_up = Linear(latent.query_rank, queries, Role.query_up, gemms)
        self.latent_down = Linear(width, latent.kv_rank + latent.rope_dim, Role.latent_down, gemms)
        self.latent_norm = RMSNorm(latent.kv_rank, _NORM_EPS, Role.latent_norm, gemms)
        each = model.head_dim - latent.rope_dim + latent.value_dim
        self.latent_up = Linear(latent.kv_rank, model.num_heads * each, Role.latent_up, gemms)
        self.output = Linear(model.num_heads * latent.value_dim, width, Role.attention_output, gemms)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        dtype, chunk = self.output.gemm.compute_dtype, self.layer.attention_chunk_size
        rotation = context.rotation(self.model, self.layer, dtype) if self.layer.rope else None
        temperature = context.temperature(self.model, dtype) if self.layer.temperature else None
        q_BTHK = scale_queries(self._queries(x_BTD, rotation), self._step(), temperature)
        k_BTHK, v_BTHK = self._keys_and_values(x_BTD, rotation)
        if context.cache is not None:
            k_BTHK, v_BTHK = context.cache.extend(self, chunk, k_BTHK, v_BTHK)
        y_BTHK = self.attend(q_BTHK, k_BTHK, v_BTHK, context, chunk)
        return self.output(y_BTHK[..., : self.latent.value_dim].flatten(-2))

    def _step(self) -> HeadStep:
        model, yarn = self.model, self.model.rope_yarn
        scale = model.multipliers.attention * (1.0 if yarn is None else yarn.logit_factor)
        return HeadStep(model.num_heads, model.num_heads, model.head_dim, query_scale=scale)

    def _queries(self, x_BTD: Tensor, rotation: Tensor | None) -> Tensor:
        if self.latent.query_rank is None:
            q_BTX = self.query(x_BTD)
        else:
            q_BTX = self.query_up(self.query_norm(self.query_down(x_BTD)))
        q_BTHK = q_BTX.unflatten(-1, (-1, self.model.head_dim))
        if rotation is None:
            return q_BTHK
        still, turned = q_BTHK.split([self.model.head_dim - self.latent.rope_dim, self.latent.rope_dim], -1)
        return torch.cat([still, rotate(turned, rotation, self.model.rope_pairing)], -1)

    def _keys_and_values(self, x_BTD: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys, and values padded to the width of keys, both [B, T, H, K]."""
        latent, still = self.latent, self.model.head_dim - self.latent.rope_dim
        c_BTL, turned_BTR = self.latent_down(x_BTD).split([latent.kv_rank, latent.rope_dim], -1)
        turned_BT1R = turned_BTR[:, :, None]
        if rotation is not None:
            turned_BT1R = rotate(turned_BT1R, rotation, self.model.rope_pairing)
        kv_BTHX = self.latent_up(self.latent_norm(c_BTL)).unflatten(-1, (-1, still + latent.value_dim))
        k_BTHN, v_BTHV = kv_BTHX.split([still, latent.value_dim], -1)
        k_BTHK = torch.cat([k_BTHN, turned_BT1R.expand(-1, -1, k_BTHN.shape[2], -1)], -1)
        return k_BTHK, F.pad(v_BTHV, (0, self.model.head_dim - latent.value_dim))
