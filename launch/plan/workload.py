"""Describe a training job for the planner: the model's shapes, the layout, the batch and the software that runs it.

These classes describe other frameworks' jobs as well as ours, so they hold shapes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from core.errors import ConfigError
from launch.plan.cluster import Gpu

MOST_LAYERS = 1000


class Software(Enum):
    """The framework that runs the job. Its habits are in `launch.plan.habits`."""

    megatron = "megatron"
    nanotron = "nanotron"
    fsdp2 = "fsdp2"
    """PyTorch's fully_shard: torchtitan, NeMo Automodel."""
    fsdp1 = "fsdp1"
    """PyTorch's first FSDP: llm-foundry."""
    deepspeed = "deepspeed"


class Sharding(Enum):
    """What data parallelism shards."""

    none = "none"
    optimizer = "optimizer"
    """ZeRO-1, Megatron's distributed optimizer."""
    gradients = "gradients"
    """ZeRO-2, or FSDP that keeps the gathered parameters for the whole step."""
    parameters = "parameters"
    """ZeRO-3, FSDP."""


class AttentionKernel(Enum):
    """Kernel of the attention."""

    flash = "flash"
    unfused = "unfused"
    """Scores, softmax and dropout are written to memory: 5 bytes per score are kept."""


class LossKernel(Enum):
    """Kernel of the cross-entropy. Each keeps another number of bytes per logit."""

    plain = "plain"
    compiled = "compiled"
    """Megatron's own fusion by torch.compile."""
    fused = "fused"
    """Transformer Engine's, which writes the gradient over the logits."""
    chunked = "chunked"
    """Head and loss together, some tokens at a time."""


class ProductDtype(Enum):
    """Dtype of the matrix products."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    fp8 = "fp8"
    mxfp8 = "mxfp8"
    nvfp4 = "nvfp4"

    @property
    def is_quantised(self) -> bool:
        return self in (ProductDtype.fp8, ProductDtype.mxfp8, ProductDtype.nvfp4)


@dataclass(frozen=True)
class LatentShapes:
    """Ranks and head sizes of multi-head latent attention (DeepSeek-V2, 2405.04434)."""

    query_rank: int | None
    key_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


@dataclass(frozen=True)
class ExpertShapes:
    """Shapes of the mixture-of-experts layers."""

    count: int
    top_k: int
    hidden: int
    shared_hidden: int = 0
    every: int = 1
    """A layer is MoE if its index is a multiple of `every`, from `first_dense` on."""
    first_dense: int = 0
    groups: int | None = None
    """Groups of experts that a token's experts lie in (DeepSeek-V3: 4 of 8); None: no limit."""


@dataclass(frozen=True)
class EncoderShapes:
    """The encoder of an encoder-decoder: of all layers, the first `layers`, over sequences of `seq` tokens."""

    layers: int
    seq: int


@dataclass(frozen=True)
class Shapes:
    """Shapes of a decoder. `mtp`: further layers that predict later tokens, each with a head (DeepSeek-V3)."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int
    gated: bool = True
    tied: bool = False
    biases: bool = False
    learned_positions: int = 0
    dropout: bool = False
    window: int | None = None
    """Tokens that a windowed layer looks back; every second layer is windowed."""
    chunk: int | None = None
    """Tokens of a chunk in which all layers attend (Llama 4); None: to all earlier tokens."""
    latent: LatentShapes | None = None
    experts: ExpertShapes | None = None
    biased_experts: bool = False
    """Experts have biases and a clamped activation, which kernels do not fuse (GPT-OSS)."""
    mtp: int = 0
    encoder: EncoderShapes | None = None

    @cached_property
    def is_moe(self) -> tuple[bool, ...]:
        """Whether each layer is MoE, MTP layers last."""
        if self.experts is None:
            return (False,) * (self.layers + self.mtp)
        moe = self.experts
        found = [i >= moe.first_dense and (i - moe.first_dense) % moe.every == 0 for i in range(self.layers)]
        return (*found, *[found[-1]] * self.mtp)

    @property
    def query_size(self) -> int:
        latent = self.latent
        return self.heads * (self.head_dim if latent is None else latent.nope_dim + latent.rope_dim)

    @property
    def value_size(self) -> int:
        return self.heads * (self.head_dim if self.latent is None else self.latent.value_dim)

    @property
    def key_size(self) -> int:
        return self.kv_heads * self.head_dim if self.latent is None else self.query_size

    @cached_property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention matrices."""
        h, latent = self.hidden, self.latent
        if latent is None:
            return h * (2 * self.query_size + 2 * self.key_size)
        query = h * self.query_size
        if latent.query_rank:
            query = latent.query_rank * (h + self.query_size)
        keys = h * (latent.key_rank + latent.rope_dim)
        keys += latent.key_rank * self.heads * (latent.nope_dim + latent.value_dim)
        return query + keys + h * self.value_size

    @cached_property
    def dense_parameters(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @cached_property
    def shared_parameters(self) -> int:
        return 0 if self.experts is None else (3 if self.gated else 2) * self.hidden * self.experts.shared_hidden

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return 0 if self.experts is None else (3 if self.gated else 2) * self.hidden * self.experts.hidden

    def total_parameters(self) -> int:
        """Parameters in matrices and tables."""
        total = (1 if self.tied else 2) * self.vocab * self.hidden + self.learned_positions * self.hidden
        for moe in self.is_moe[: self.layers]:
            total += self.attention_parameters
            if moe and self.experts is not None:
                total += self.shared_parameters + self.experts.count * (self.expert_parameters + self.hidden)
            else:
                total += self.dense_parameters
        return total

    def flops_per_token(self, seq: int) -> float:
        """Forward and backward FLOPs per token: 6 per active matrix parameter, attention over causal pairs. The
        convention is that of `model.flops`.
        """
        matrices = self.vocab * self.hidden * (1 + self.mtp) + 2 * self.mtp * self.hidden**2
        attention = 0.0
        for i, moe in enumerate(self.is_moe):
            matrices += self.attention_parameters
            if moe and self.experts is not None:
                matrices += self.shared_parameters + self.experts.top_k * self.expert_parameters
                matrices += self.experts.count * self.hidden
            else:
                matrices += self.dense_parameters
            attention += self.reach(i, seq) * (self.query_size + self.value_size)
        return 6.0 * matrices + 6.0 * attention

    def reach(self, layer: int, seq: int) -> float:
        """Keys that an average query of a causal layer attends to."""
        seq = min(seq, self.chunk or seq)
        if self.window is None or layer % 2 or self.window >= seq:
            return seq / 2
        return self.window - self.window**2 / (2 * seq)


@dataclass(frozen=True)
class Axes:
    """Sizes of the parallel axes. Expert ranks fold over the dense ranks: dp*cp*tp = ep*etp*expert data parallelism."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    sequence_parallel: bool = True

    def __post_init__(self) -> None:
        for name in ("tp", "cp", "pp", "vpp", "ep", "etp", "dp"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(name, value, "must be at least 1", [1])
        if self.dense_ranks % (self.ep * self.etp):
            reason = f"ep*etp={self.ep * self.etp} must divide dp*cp*tp={self.dense_ranks}"
            raise ConfigError("ep", self.ep, reason)

    @property
    def dense_ranks(self) -> int:
        return self.dp * self.cp * self.tp

    @property
    def ranks(self) -> int:
        return self.dense_ranks * self.pp

    @property
    def expert_dp(self) -> int:
        return self.dense_ranks // (self.ep * self.etp)


@dataclass(frozen=True)
class Job:
    """A training job. `gbs` and `mbs` count sequences; `recompute` names modules, or "full"."""

    shapes: Shapes
    axes: Axes
    gpu: Gpu
    seq: int
    mbs: int
    gbs: int
    precision: ProductDtype = ProductDtype.bf16
    sharding: Sharding = Sharding.optimizer
    optimizer_shards: int = 1
    """Groups of ranks that each hold the whole sharded optimizer state (HSDP, Megatron's optimizer instances)."""
    software: Software = Software.megatron
    released: float = 2026.0
    """Year of the software, with its fraction."""
    attention: AttentionKernel = AttentionKernel.flash
    recompute: frozenset[str] = field(default_factory=frozenset)
    loss: LossKernel = LossKernel.plain
    overlapped: bool = True
    """Whether collectives of tp, ep and dp may run beside kernels."""
    forced_balance: bool = True
    traits: frozenset[str] = field(default_factory=frozenset)
    """Further facts that a source states: see `launch.plan.habits`."""
    edges: tuple[int, int] | None = None
    """Layers of the first and the last stage, where a source states them."""

    def __post_init__(self) -> None:
        shapes, axes = self.shapes, self.axes
        sizes = {name: getattr(shapes, name) for name in ("hidden", "layers", "ffn", "heads", "kv_heads", "vocab")}
        sizes["head_dim"] = shapes.head_dim
        if shapes.experts is not None:
            moe = shapes.experts
            sizes |= {"experts": moe.count, "topk": moe.top_k, "expert_ffn": moe.hidden, "moe_every": moe.every}
        if shapes.latent is not None:
            sizes["kv_lora_rank"] = shapes.latent.key_rank
        for name, size in (sizes | {"seq": self.seq, "mbs": self.mbs, "gbs": self.gbs}).items():
            if size < 1:
                raise ConfigError(name, size, "must be at least 1", [1])
        if shapes.layers > MOST_LAYERS:
            raise ConfigError("layers", shapes.layers, f"must be at most {MOST_LAYERS}")
        most = MOST_LAYERS if self.software is Software.nanotron else shapes.layers + 4  # its stages may be empty
        if axes.pp * axes.vpp > most:
            reason = f"with vpp={axes.vpp} there are more chunks than the model's {shapes.layers} layers"
            raise ConfigError("pp", axes.pp, reason)
        if self.tokens < 1:
            raise ConfigError("cp", axes.cp, f"must be at most seq={self.seq}")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank of tp and cp together with its tp group."""
        return self.mbs * self.seq // self.axes.cp

    @property
    def micro_batches(self) -> int:
        return max(1, math.ceil(self.gbs / (self.axes.dp * self.mbs)))

    @property
    def recomputes_all(self) -> bool:
        return "full" in self.recompute
