"""Model FLOPs of training per token, and parameter counts.

Convention: a multiply-add counts as 2 FLOPs, and the backward pass as twice the forward pass. Recomputation is not
counted. Attention counts causal pairs only: on average half the sequence per query, or half the chunk in chunked
layers. The head is counted; the embedding, norms, activations and softmax are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import FeedForward, LayerConfig, ModelConfig, QKNorm
from model.vision.config import VisionConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, forward and backward."""

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention


def training_flops(model: ModelConfig, seq_len: int) -> Flops:
    """Return the FLOPs per token for sequences of one document each. Attention in packed documents needs fewer."""
    active = model.hidden_size * model.vocab_size + sum(active_parameters(model, layer) for layer in model.blocks)
    reach = sum(min(seq_len, layer.attention_chunk_size or seq_len) for layer in model.blocks)
    return Flops(matrices=6.0 * active, attention=6.0 * reach * model.num_heads * model.head_dim)


def active_parameters(model: ModelConfig, layer: LayerConfig) -> int:
    """Return how many parameters in the matrices of one layer each token uses."""
    attention = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
    if layer.feed_forward is FeedForward.dense:
        return attention + 3 * model.hidden_size * model.dense_hidden_size
    sizes = model.router.top_k * model.expert_hidden_size + model.shared_hidden_size
    return attention + 3 * model.hidden_size * sizes + model.num_experts * model.hidden_size


def vision_flops(vision: VisionConfig, decoder_size: int) -> Flops:
    """Return the FLOPs per tile of the encoder, its adapter and its projector."""
    positions, c, a = vision.patches + 1, vision.hidden_size, vision.adapter_hidden_size
    layer = 4 * c * c + 2 * c * vision.mlp_hidden_size
    adapter = vision.tokens_per_tile * (vision.shuffled_size * a + a * a + a * decoder_size)
    products = vision.patches * vision.patch_values * c + positions * vision.num_layers * layer + adapter
    return Flops(matrices=6.0 * products, attention=12.0 * vision.num_layers * positions**2 * c)


def vision_parameters(vision: VisionConfig, decoder_size: int) -> int:
    """Return the number of parameters of the encoder, its adapter and its projector."""
    c, f, a = vision.hidden_size, vision.mlp_hidden_size, vision.adapter_hidden_size
    layer = 4 * c * c + 2 * c * f + 4 * c + f + c + 4 * c  # matrices, their biases, two layer norms
    ends = vision.patch_values * c + c + (vision.patches + 1) * c + 4 * c
    return vision.num_layers * layer + ends + vision.shuffled_size * a + a * a + a * decoder_size


@dataclass(frozen=True)
class Parameters:
    total: int
    active: int
    """Parameters that each token uses, including embedding, head, norms and the vision encoder."""


def count_parameters(model: ModelConfig) -> Parameters:
    """Return the numbers of total and active parameters, in closed form."""
    tables = 1 if model.tie_embeddings else 2
    outside = tables * model.vocab_size * model.hidden_size + model.hidden_size
    layers = model.blocks
    gains = {QKNorm.per_head: 2 * model.head_dim, QKNorm.full: model.head_dim * (model.num_heads + model.num_kv_heads)}
    active = outside + sum(
        active_parameters(model, layer) + 2 * model.hidden_size + gains.get(layer.qk_norm, 0) for layer in layers
    )
    moe = sum(layer.feed_forward is FeedForward.moe for layer in layers)
    active += 0 if model.vision is None else vision_parameters(model.vision, model.hidden_size)
    idle = moe * 3 * model.hidden_size * model.expert_hidden_size * (model.num_experts - model.router.top_k)
    return Parameters(active + idle, active)
