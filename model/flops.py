"""Model FLOPs of training per token, parameter counts, and the peak FLOPS of devices.

Convention: a multiply-add counts as 2 FLOPs, and the backward pass as twice the forward pass. Recomputation is not
counted. A frozen matrix has no gradient, which saves a third. Attention counts causal pairs only: on average half the
document per query, or half the chunk in chunked layers. The head is counted; the embedding, norms, activations and
softmax are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import FeedForward, LayerConfig, ModelConfig, QKNorm
from model.roles import Role
from model.vision.config import VisionConfig

if TYPE_CHECKING:
    import torch

PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H800": 989.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA GH200 480GB": 989.5e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}
"""Dense bf16 peak FLOPS by the device's name, from the vendors' data sheets. Cards of one chip differ in clock and
power, and a slice of a GPU (MIG) has a name of its own, so only the whole name counts.
"""


@dataclass(frozen=True)
class Flops:
    """FLOPs, forward and backward."""

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention


Lengths = int | Mapping[int | None, float]
"""Length of documents in tokens: that of all, or the mean over tokens of the length of their document (key None), or of
their chunk of it (key: the chunk size). Such a mean is the sum of the squared lengths, divided by the tokens.
"""


def mean_lengths(squares: Mapping[int | None, int], tokens: int) -> dict[int | None, float]:
    """Return `Lengths` of documents whose `attention.plan.squared_lengths` are known for each chunk size."""
    return {chunk: total / max(tokens, 1) for chunk, total in squares.items()}


def training_flops(model: ModelConfig, lengths: Lengths, frozen: AbstractSet[Role] = frozenset()) -> Flops:
    """Return the FLOPs per token for documents of these lengths. Gradients are assumed to pass through every layer of
    the decoder.
    """
    head = model.hidden_size * model.vocab_size
    active = head + sum(active_parameters(model, layer) for layer in model.blocks)
    still = head if (Role.embedding if model.tie_embeddings else Role.head) in frozen else 0
    for layer in model.blocks if frozen else ():
        still += sum(size for role, size in active_matrices(model, layer).items() if role in frozen)
    chunks = [layer.attention_chunk_size for layer in model.blocks]
    if isinstance(lengths, int):
        reach = float(sum(min(lengths, chunk or lengths) for chunk in chunks))
    else:
        reach = sum(lengths[chunk] for chunk in chunks)
    return Flops(matrices=6.0 * active - 2.0 * still, attention=6.0 * reach * attention_width(model))


def attention_width(model: ModelConfig) -> float:
    """Return the mean width of all query heads together and of all their results."""
    value_dim = model.head_dim if model.latent is None else model.latent.value_dim
    return model.num_heads * (model.head_dim + value_dim) / 2


def active_parameters(model: ModelConfig, layer: LayerConfig) -> int:
    """Return how many parameters in the matrices of one layer each token uses."""
    return sum(active_matrices(model, layer).values())


def active_matrices(model: ModelConfig, layer: LayerConfig) -> dict[Role, int]:
    """Return how many parameters in the matrices of one layer each token uses, by role."""
    found = _attention_matrices(model)
    if layer.feed_forward is FeedForward.dense:
        return found | dict.fromkeys(
            (Role.dense_gate, Role.dense_up, Role.dense_down), model.hidden_size * model.dense_hidden_size
        )
    shared = dict.fromkeys(
        (Role.shared_gate, Role.shared_up, Role.shared_down), model.hidden_size * model.shared_hidden_size
    )
    expert = model.router.top_k * model.hidden_size * model.expert_hidden_size
    routed = {Role.expert_gate_up: 2 * expert, Role.expert_down: expert}
    return found | shared | routed | {Role.router: model.num_experts * model.hidden_size}


def _attention_matrices(model: ModelConfig) -> dict[Role, int]:
    width, latent = model.hidden_size, model.latent
    queries, keys = (width * model.head_dim * n for n in (model.num_heads, model.num_kv_heads))
    if latent is None:
        return {Role.query: queries, Role.key: keys, Role.value: keys, Role.attention_output: queries}
    each = model.head_dim - latent.rope_dim + latent.value_dim
    found = {
        Role.latent_down: width * (latent.kv_rank + latent.rope_dim),
        Role.latent_up: latent.kv_rank * model.num_heads * each,
        Role.attention_output: width * model.num_heads * latent.value_dim,
    }
    if (rank := latent.query_rank) is None:
        return found | {Role.query: queries}
    return found | {Role.query_down: width * rank, Role.query_up: rank * model.num_heads * model.head_dim}


def vision_flops(vision: VisionConfig, decoder_size: int, frozen: AbstractSet[Role] = frozenset()) -> Flops:
    """Return the FLOPs per tile of the encoder, its adapter and its projector. No gradient passes through a part if it
    and all parts before it are frozen.
    """
    positions, c, a, q = vision.patches + 1, vision.hidden_size, vision.adapter_hidden_size, vision.tokens_per_tile
    square, wide = (positions * vision.num_layers * c * size for size in (c, vision.mlp_hidden_size))
    layers = dict.fromkeys((Role.vision_query, Role.vision_key, Role.vision_value, Role.vision_output), square)
    layers |= {Role.vision_up: wide, Role.vision_down: wide}
    layers[Role.vision_patch] = vision.patches * vision.patch_values * c
    rest = {Role.adapter_in: q * vision.shuffled_size * a, Role.adapter_out: q * a * a}
    rest[Role.projector] = q * a * decoder_size
    outside = {Role.vision_position, Role.vision_norm, Role.vision_bias}
    reached = not frozen >= layers.keys() | outside
    attention = 4.0 * (1 + 2 * reached) * vision.num_layers * positions**2 * c
    matrices = sum(size * (2 + 2 * reached + 2 * (role not in frozen)) for role, size in layers.items())
    for role, size in rest.items():
        reached = reached or role not in frozen
        matrices += size * (2 + 2 * reached + 2 * (role not in frozen))
    return Flops(matrices=float(matrices), attention=attention)


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
    latent = 0 if model.latent is None else model.latent.kv_rank + (model.latent.query_rank or 0)
    active = outside + sum(
        active_parameters(model, layer) + 2 * model.hidden_size + gains.get(layer.qk_norm, 0) + latent
        for layer in layers
    )
    moe = sum(layer.feed_forward is FeedForward.moe for layer in layers)
    active += 0 if model.vision is None else vision_parameters(model.vision, model.hidden_size)
    idle = moe * 3 * model.hidden_size * model.expert_hidden_size * (model.num_experts - model.router.top_k)
    return Parameters(active + idle, active)


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bf16 peak in FLOPS, or None if it is unknown (as for a CPU); MFU is then None."""
    if device.type != "cuda":
        return None
    import torch

    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))
