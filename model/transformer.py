"""The decoder: embedding, layers of attention and feed-forward with pre-normalisation, final norm, untied head.

Shapes: B batch, T sequence, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import FeedForward, LayerConfig, ModelConfig
from model.context import SequenceContext
from model.layers import Embedding, GatedMLP, Linear, RMSNorm
from model.moe import MixtureOfExperts
from model.roles import Role
from precision.backend import GemmBackend


class Layer(nn.Module):
    """h = x + attention(norm(x)); h + ffn(norm(h))."""

    def __init__(self, model: ModelConfig, layer: LayerConfig, gemm: GemmBackend) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.width, model.norm_eps, Role.block_norm)
        self.attention = Attention(model, layer, gemm)
        self.ffn_norm = RMSNorm(model.width, model.norm_eps, Role.block_norm)
        self.is_moe = layer.feed_forward is FeedForward.moe
        roles = (Role.dense_gate, Role.dense_up, Role.dense_down)
        self.ffn = (
            MixtureOfExperts(model, gemm) if self.is_moe else GatedMLP(model.width, model.dense_width, roles, gemm)
        )

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        h_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context)
        z_BTD = self.ffn_norm(h_BTD)
        return h_BTD + (self.ffn(z_BTD, context) if self.is_moe else self.ffn(z_BTD))


class Transformer(nn.Module):
    """Token ids [B, T] to logits [B, T, V]. Built without initial weights: see `model.init`."""

    def __init__(self, config: ModelConfig, gemm: GemmBackend) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, gemm.compute_dtype)
        self.layers = nn.ModuleList(Layer(config, layer, gemm) for layer in config.blocks)
        self.final_norm = RMSNorm(config.width, config.norm_eps, Role.final_norm)
        self.head = Linear(config.width, config.vocab_size, Role.head, gemm)

    def forward(self, tokens_BT: Tensor, context: SequenceContext | None = None) -> Tensor:
        """Without a context each row is one document from position 0."""
        if context is None:
            positions_BT = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
            context = SequenceContext(positions_BT, tokens_BT.device)
        x_BTD = self.embedding(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, context)
        return self.head(self.final_norm(x_BTD))
