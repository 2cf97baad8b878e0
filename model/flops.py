"""Floating-point operations of training, per token.

Convention: a multiply-add counts 2; the backward pass costs twice the forward; recomputation is not counted (model
FLOPs). Attention counts causal pairs only: on average half the keys within a layer's reach, where a chunked layer
reaches its chunk. The embedding is a lookup and counts nothing, the head counts. Norms, activations and the
softmax are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import FeedForward, LayerConfig, ModelConfig, QKNorm


@dataclass(frozen=True)
class Flops:
    """Per token of a training step, forward and backward."""

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention


def training_flops(model: ModelConfig, context: int) -> Flops:
    """FLOPs per token at rows of `context` tokens that are one document each (packing makes attention cheaper)."""
    active = model.hidden_size * model.vocab_size + sum(active_parameters(model, layer) for layer in model.blocks)
    inner = model.num_heads * model.head_dim
    reach = sum(min(context, layer.attention_chunk_size or context) for layer in model.blocks)
    return Flops(matrices=6.0 * active, attention=6.0 * reach * inner)


def active_parameters(model: ModelConfig, layer: LayerConfig) -> int:
    """Parameters of one layer's matrices that a token is multiplied with."""
    attention = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
    if layer.feed_forward is FeedForward.dense:
        return attention + 3 * model.hidden_size * model.dense_hidden_size
    widths = model.router.top_k * model.expert_hidden_size + model.shared_hidden_size
    return attention + 3 * model.hidden_size * widths + model.num_experts * model.hidden_size


@dataclass(frozen=True)
class Parameters:
    total: int
    active: int
    """What a token is multiplied with, both embeddings and norms included."""


def count_parameters(model: ModelConfig) -> Parameters:
    """Parameters of the whole model in closed form, and how many of them a token uses."""
    tables = 1 if model.tie_embeddings else 2
    outside = tables * model.vocab_size * model.hidden_size + model.hidden_size
    layers = model.blocks
    gains = {QKNorm.per_head: 2 * model.head_dim, QKNorm.full: model.head_dim * (model.num_heads + model.num_kv_heads)}
    active = outside + sum(
        active_parameters(model, layer) + 2 * model.hidden_size + gains.get(layer.qk_norm, 0) for layer in layers
    )
    moe = sum(layer.feed_forward is FeedForward.moe for layer in layers)
    idle = moe * 3 * model.hidden_size * model.expert_hidden_size * (model.num_experts - model.router.top_k)
    return Parameters(active + idle, active)
