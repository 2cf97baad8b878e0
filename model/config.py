"""Architecture of a model. Shorthands (`moe_every`, `nope_every`, ...) expand to an explicit list of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from core.errors import ConfigError, check_numbers, divisors
from model.vision.config import VisionConfig


class FeedForward(Enum):
    dense = "dense"
    """One SwiGLU for all tokens."""
    moe = "moe"
    """A router and experts."""


class QKNorm(Enum):
    none = "none"
    weightless = "weightless"
    """Llama 4: RMS norm over each head after the rotation, without a gain, in layers with rotary positions only."""
    per_head = "per_head"
    """Qwen 3: RMS norm over each head before the rotation, with one gain for all heads."""
    full = "full"
    """OLMoE: RMS norm over all heads jointly before the rotation, with a gain."""


class RopePairing(Enum):
    """Elements of a head that rotate as a pair: (2j, 2j + 1) in Llama 4, (j, j + K/2) in most others."""

    adjacent = "adjacent"
    halves = "halves"


class Score(Enum):
    sigmoid = "sigmoid"
    """Each expert's logit alone."""
    softmax = "softmax"
    """All experts' logits together: the scores sum to 1."""


class WeightsOn(Enum):
    """Whether routing weights scale an expert's output or, as in Llama 4, its input, so that the SiLU sees them."""

    input = "input"
    output = "output"


class AuxScope(Enum):
    """Tokens over which the auxiliary loss measures the load of experts.

    `sequence`: each sequence; the loss is the same under every layout. `whole`: the global batch of the previous step,
    whose load a pipeline knows before its first backward pass. `micro`: each micro-batch; the loss depends on
    the micro-batch size.
    """

    sequence = "sequence"
    whole = "whole"
    micro = "micro"


@dataclass(frozen=True)
class LayerConfig:
    """One transformer layer."""

    feed_forward: FeedForward = FeedForward.dense
    """Kind of the feed-forward layer."""
    rope: bool = True
    """Rotate queries and keys by position. False: no positions (NoPE)."""
    attention_chunk_size: int | None = None
    """Attend within chunks of this many positions, counted from the document's start. None: full causal."""
    temperature: bool = False
    """Scale queries by position; see `ModelConfig.temperature`."""
    qk_norm: QKNorm = QKNorm.none
    """Norm of queries and keys."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("attention_chunk_size",))


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: stretch long wavelengths by `factor`, keep short ones, blend in between."""

    factor: float = 16.0
    """Wavelengths above original_seq_len / low_freq_factor are stretched by this; 1: no change."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_seq_len / low_freq_factor are stretched in full."""
    high_freq_factor: float = 1.0
    """Wavelengths below original_seq_len / high_freq_factor are kept."""
    original_seq_len: int = 8192
    """Sequence length in tokens before the scaling."""

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor <= self.high_freq_factor):
            raise ConfigError("factor", self.factor, "must be at least 1, with 0 < low_freq_factor <= high_freq_factor")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's frequency scaling (Peng et al. 2023, arXiv 2309.00071, section 3.2): wavelengths that fit into the
    original sequence fewer than `beta_slow` times are stretched by `factor`, those that fit more than `beta_fast` times
    are kept.

    m(x) = 1 + 0.1 x ln(factor). Cosines and sines are multiplied by m(mscale) / m(mscale_all_dim), or by m(1) without
    both. Attention logits are multiplied by m(mscale_all_dim)^2 (DeepSeek-V3, latent attention only).
    """

    factor: float = 40.0
    """Factor by which long wavelengths are stretched."""
    original_seq_len: int = 4096
    """Sequence length in tokens before the scaling."""
    beta_fast: float = 32.0
    """Wavelengths that fit this often into `original_seq_len` are kept."""
    beta_slow: float = 1.0
    """Wavelengths that fit this often into `original_seq_len` are stretched in full."""
    mscale: float = 0.0
    """Used in the factor of cosines and sines; 0: none."""
    mscale_all_dim: float = 0.0
    """Used in the factors of cosines and sines, and of attention logits; 0: none."""
    truncate: bool = True
    """Round the range of pairs that are blended to whole pairs."""

    def __post_init__(self) -> None:
        check_numbers(self, ("original_seq_len", "beta_fast", "beta_slow"), ("mscale", "mscale_all_dim"))
        if not (self.factor >= 1 and self.beta_slow <= self.beta_fast):
            raise ConfigError("factor", self.factor, "must be at least 1, with beta_slow <= beta_fast")

    @property
    def rotation_factor(self) -> float:
        """The factor of cosines and sines."""
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    @property
    def logit_factor(self) -> float:
        """The factor of the logits of latent attention."""
        return self._grown(self.mscale_all_dim) ** 2

    def _grown(self, mscale: float) -> float:
        return 1 + 0.1 * mscale * math.log(self.factor)


@dataclass(frozen=True)
class LatentConfig:
    """Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values of all heads are projected up from
    one vector per token, and so are queries. Of the `head_dim` elements of a query or key, the last `rope_dim` carry
    the position; those of the key are shared by all heads.
    """

    kv_rank: int = 512
    """Width of the vector from which keys and values are projected up."""
    query_rank: int | None = 1536
    """Width of the vector from which queries are projected up. None: they are projected directly."""
    rope_dim: int = 64
    """Elements of a query or key that are rotated; even, and fewer than `head_dim`."""
    value_dim: int = 128
    """Width of a value head, at most `head_dim`."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("kv_rank", "query_rank", "rope_dim", "value_dim"))
        if self.rope_dim % 2:
            raise ConfigError("rope_dim", self.rope_dim, "must be even: the rotation acts on pairs")

    def wider(self, factor: int) -> LatentConfig:
        """Return the same with ranks `factor` times as large. Sizes of a head stay the same."""
        query_rank = None if self.query_rank is None else self.query_rank * factor
        return replace(self, kv_rank=self.kv_rank * factor, query_rank=query_rank)


@dataclass(frozen=True)
class RouterConfig:
    """Top-k routing of tokens to experts. The defaults are Llama 4's."""

    top_k: int = 1
    """Number of routed experts per token."""
    score: Score = Score.sigmoid
    """Function from the router's logits to the weights of the experts."""
    norm_topk_prob: bool = False
    """Divide the weights of a token's experts by their sum."""
    scale: float = 1.0
    """Factor on all routing weights."""
    weights_on: WeightsOn = WeightsOn.input
    groups: int = 1
    """Groups of consecutive experts, such as those of a node. A token's experts are in few of them."""
    top_groups: int = 1
    """Groups in which a token's experts are: those whose two largest scores have the largest sums (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2).
    """
    selection_bias: bool = False
    """Choose experts by their scores plus a bias that is not trained, even if `balance.bias_rate` is 0."""
    force_balanced: bool = False
    """Assign tokens to experts in turn, ignoring the router. For benchmarks only."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("top_k", "scale", "groups", "top_groups"))
        if self.top_groups > self.groups:
            raise ConfigError("top_groups", self.top_groups, f"must not exceed the {self.groups} groups")

    def kind(self) -> dict[str, str]:
        """Return the choices in which two models must agree for hyperparameters to transfer."""
        norm = str(self.norm_topk_prob).lower()
        return {"score": self.score.value, "norm_topk_prob": norm, "weights_on": self.weights_on.value}


@dataclass(frozen=True)
class BalanceConfig:
    """Load balancing of experts. A coefficient of 0 disables its term; any combination is allowed."""

    bias_rate: float = 0.0
    """Step of an expert's selection bias: up below the mean load, down above it (Wang et al. 2024, 2408.15664)."""
    aux: float = 0.0
    """Coefficient of the auxiliary loss E * sum_e load_e * probability_e, mean over tokens (Fedus et al. 2021, 2.2)."""
    aux_scope: AuxScope = AuxScope.sequence
    """Used if `aux` is not 0."""
    z: float = 0.0
    """Coefficient of the router z-loss: squared log-sum-exp of logits, mean over tokens (Zoph et al. 2022, 3.1)."""

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("bias_rate", "aux", "z"))


@dataclass(frozen=True)
class InitConfig:
    """Initial weights, normal with mean 0. A std of None (embedding, head, router) follows `std` and `fan_in`."""

    std: float = 0.02
    """Standard deviation of every matrix without a setting of its own."""
    fan_in: bool = False
    """Divide `std` by sqrt(fan_in)."""
    embedding_std: float | None = None
    """Standard deviation of the embedding; null: as `std` and `fan_in` say."""
    head_std: float | None = None
    """Standard deviation of the head; null: as `std` and `fan_in` say."""
    router_std: float | None = None
    """Standard deviation of the routers; null: as `std` and `fan_in` say."""
    depth_scaled: bool = False
    """Divide std by sqrt(2 * num_layers) for matrices that write to the residual stream (Radford et al. 2019, 2.3)."""
    roles: dict[str, float] = field(default_factory=dict)
    """Absolute standard deviations by role (`query`, `router`, ...), overriding the fields above. Written by MetaP."""

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("std", "embedding_std", "head_std", "router_std"))
        for role, std in self.roles.items():
            if not (math.isfinite(std) and std >= 0):
                raise ConfigError(f"roles.{role}", std, "must not be negative")


@dataclass(frozen=True)
class MultipliersConfig:
    """Constant factors of the forward pass, set by MetaP; published models have 1. The module `model.multipliers` folds
    them into weights.
    """

    residual: float = 1.0
    """Factor on the outputs of attention and feed-forward layers."""
    logits: float = 1.0
    """Factor on the logits."""
    attention: float = 1.0
    """Factor on the queries, in addition to 1 / sqrt(head_dim)."""
    gates: float = 1.0
    """Factor on the combined output of the routed experts."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("residual", "logits", "attention", "gates"))


class UpcycleMethod(Enum):
    """How a dense layer becomes experts.

    `copy`: each expert is a copy of the dense layer (Komatsuzaki et al. 2022, arXiv 2212.05055). With a shared expert,
    the shared expert is the copy, and routed experts start with a zero down projection. `split`: each expert is a slice
    of the dense hidden size, and routers start such that a token's experts are complete sets of slices (He et al. 2024,
    arXiv 2410.07524). `noise`: `copy` plus normal noise on the experts' weights.
    """

    copy = "copy"
    split = "split"
    noise = "noise"


@dataclass(frozen=True)
class UpcycleConfig:
    """Sparse upcycling of the dense checkpoint `model.init_from`."""

    method: UpcycleMethod = UpcycleMethod.copy
    noise_std: float = 0.01
    """Absolute standard deviation of the noise; only for the method `noise`."""

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("noise_std",))


@dataclass(frozen=True)
class InitPartsConfig:
    """Initial weights of parts of the model, each from another model. Every other parameter starts as in a new model.

    A part is what `training.freeze` calls by the same name. The projector maps one encoder's rows to one decoder's
    width: it is read with the encoder only from a language model of this width.
    """

    vision: str | None = field(default=None, metadata={"path": True})
    """The vision encoder: the directory of a run, contrastive or not, or of an imported or Hugging Face model."""
    decoder: str | None = field(default=None, metadata={"path": True})
    """Everything but the vision encoder: the directory of a run, or of an imported or Hugging Face model."""

    @property
    def any(self) -> bool:
        return self.vision is not None or self.decoder is not None


MOST_LAYERS, MOST_ELEMENTS = 10_000, 1 << 59


@dataclass(frozen=True)
class ModelConfig:
    """A decoder; the defaults are Llama 4 Scout. `attention_chunk_size` and `temperature_floor` are in positions."""

    vocab_size: int = 202048
    """Number of token ids; at least the tokenizer's. A multiple of 128 is fast on GPUs."""
    hidden_size: int = 5120
    """Width of the residual stream. With experts, a multiple of 8."""
    num_layers: int = 48
    """Number of transformer layers."""
    num_heads: int = 40
    """Number of query heads."""
    num_kv_heads: int = 8
    """Number of key and value heads, a divisor of `num_heads`. Fewer need less memory in generation."""
    head_dim: int = 128
    """Width of one attention head; even. It need not be hidden_size / num_heads."""
    dense_hidden_size: int = 16384
    """Hidden size of the dense feed-forward layers (SwiGLU). MoE layers do not use it."""
    expert_hidden_size: int = 8192
    """Hidden size of each routed expert (SwiGLU), a multiple of 8."""
    shared_expert_hidden_size: int | None = None
    """Hidden size of the shared expert. None: equal to `expert_hidden_size`; 0: no shared expert."""
    num_experts: int = 16
    """Number of routed experts per MoE layer. `router.top_k` of them process a token."""
    moe_every: int = 1
    """Layers whose (index + 1) is a multiple of this are MoE layers; 0: none."""
    first_dense: int = 0
    """This many layers at the beginning are dense, whatever `moe_every`."""
    nope_every: int = 4
    """Layers whose (index + 1) is a multiple of this have full attention without rotary positions; 0: none."""
    attention_chunk_size: int | None = 8192
    """Layers with rotary positions attend within chunks of this many positions; null: to all earlier ones."""
    qk_norm: QKNorm = QKNorm.weightless
    """Norm of queries and keys, which limits the attention logits."""
    rope_theta: float = 500000.0
    """Base of the rotary frequencies: the largest wavelength is about 2 pi * rope_theta positions."""
    rope_pairing: RopePairing = RopePairing.adjacent
    """A checkpoint fits one pairing only."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies for sequences longer than those of the first training; null: none."""
    rope_yarn: YarnScaling | None = None
    """YaRN's scaling of the rotary frequencies, instead of `rope_scaling`; null: none."""
    latent: LatentConfig | None = None
    """Latent attention, instead of separate projections for queries, keys and values; null: none."""
    temperature: bool = True
    """Scale NoPE queries at position p by 1 + temperature_scale * ln(1 + floor((p + 1) / temperature_floor))."""
    temperature_floor: float = 8192.0
    """Position up to which queries keep their scale; the formula is at `temperature`."""
    temperature_scale: float = 0.1
    """Growth of the scale per e-fold of positions; the formula is at `temperature`. 0: none."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMS norm, so that zero vectors do not divide by zero."""
    tie_embeddings: bool = False
    """Use the embedding's weight as the head's."""
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    init: InitConfig = field(default_factory=InitConfig)
    multipliers: MultipliersConfig = field(default_factory=MultipliersConfig)
    layer_list: list[LayerConfig] | None = None
    """Explicit list of layers. None: built from the shorthands above."""
    vision: VisionConfig | None = None
    """Vision encoder for images and video; null: the model reads text only."""
    init_from: str | None = field(default=None, metadata={"path": True})
    """Initial weights: the directory of a Hugging Face checkpoint, of an imported checkpoint, or of a run."""
    init_parts: InitPartsConfig = field(default_factory=InitPartsConfig)
    upcycle: UpcycleConfig | None = None
    """Convert the dense layers of `init_from` into experts."""

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"]
        sizes += ["dense_hidden_size", "expert_hidden_size", "attention_chunk_size"]
        not_negative = ("shared_expert_hidden_size", "temperature_scale", "moe_every", "nope_every", "first_dense")
        check_numbers(self, (*sizes, "rope_theta", "temperature_floor", "norm_eps"), not_negative)
        if self.num_layers > MOST_LAYERS:
            raise ConfigError("num_layers", self.num_layers, f"must be at most {MOST_LAYERS:,}")
        if self.num_heads % self.num_kv_heads:
            legal = divisors(self.num_heads)
            raise ConfigError("num_kv_heads", self.num_kv_heads, f"must divide the {self.num_heads} query heads", legal)
        if self.head_dim % 2:
            raise ConfigError("head_dim", self.head_dim, "must be even: the rotation acts on pairs")
        if self.layer_list is not None and len(self.layer_list) != self.num_layers:
            reason = f"has {len(self.layer_list)} layers, but model.num_layers is {self.num_layers}"
            raise ConfigError("layer_list", None, reason)
        if self.latent is not None:
            self._check_latent(self.latent)
        if self.rope_yarn is not None and self.rope_scaling is not None:
            raise ConfigError("rope_yarn", None, "rope_scaling is set too: remove one of the two")
        columns = [self.vocab_size, self.num_heads * self.head_dim, 2 * self.dense_hidden_size]
        columns += [2 * self.shared_hidden_size, 2 * self.expert_hidden_size * max(self.num_experts, 1)]
        if self.hidden_size * max(columns) > MOST_ELEMENTS:
            reason = f"makes a tensor of {self.hidden_size * max(columns):.1e} elements, more than memory can address"
            raise ConfigError("hidden_size", self.hidden_size, reason)
        if self.has_experts:
            self._check_experts()
        if self.vision is not None and self.vision.image_token_id >= self.vocab_size:
            reason = f"is outside of the vocabulary of {self.vocab_size} ids"
            raise ConfigError("vision.image_token_id", self.vision.image_token_id, reason)
        if self.upcycle is not None and self.init_from is None:
            raise ConfigError("upcycle", None, "needs a dense checkpoint: set init_from")
        if self.init_from is not None and self.init_parts.any:
            raise ConfigError("init_parts", None, "init_from gives the weights of all parts: remove one of the two")

    def _check_latent(self, latent: LatentConfig) -> None:
        for key in ("rope_dim", "value_dim"):
            width = getattr(latent, key)
            if width > self.head_dim - (key == "rope_dim"):
                reason = f"must be less than model.head_dim={self.head_dim}, the width of queries and keys"
                raise ConfigError(f"latent.{key}", width, reason)
        if self.num_kv_heads != self.num_heads:
            reason = "latent attention has one key head for each query head"
            raise ConfigError("num_kv_heads", self.num_kv_heads, reason, [self.num_heads])
        if any(layer.qk_norm is not QKNorm.none for layer in self.blocks):
            raise ConfigError("qk_norm", self.qk_norm, "latent attention has norms of its own", [QKNorm.none.value])

    def _check_experts(self) -> None:
        if self.num_experts < 2:
            reason = "must be at least 2; moe_every=0 makes every layer dense"
            raise ConfigError("num_experts", self.num_experts, reason)
        if self.router.top_k > self.num_experts:
            raise ConfigError("router.top_k", self.router.top_k, f"must not exceed the {self.num_experts} experts")
        groups, each = self.router.groups, self.num_experts // self.router.groups
        if self.num_experts % groups:
            raise ConfigError("router.groups", groups, f"must divide the {self.num_experts} experts")
        if groups > 1 and (each < 2 or self.router.top_k > each * self.router.top_groups):
            reason = f"groups of {each} experts cannot hold a token's {self.router.top_k}; each needs two or more"
            raise ConfigError("router.top_groups", self.router.top_groups, reason)
        for key in ("hidden_size", "expert_hidden_size"):
            if getattr(self, key) % 8:  # grouped kernels need rows whose size in bfloat16 is a multiple of 16 bytes
                raise ConfigError(key, getattr(self, key), "must be a multiple of 8 for the grouped matmul")

    @property
    def blocks(self) -> list[LayerConfig]:
        """The layers, from `layer_list` or the shorthands."""
        if self.layer_list is not None:
            return self.layer_list
        return [self._layer(i) for i in range(self.num_layers)]

    @property
    def has_experts(self) -> bool:
        """Whether any layer is an MoE layer."""
        return any(layer.feed_forward is FeedForward.moe for layer in self.blocks)

    @property
    def shared_hidden_size(self) -> int:
        return self.expert_hidden_size if self.shared_expert_hidden_size is None else self.shared_expert_hidden_size

    def _layer(self, index: int) -> LayerConfig:
        nope = self.nope_every > 0 and (index + 1) % self.nope_every == 0
        moe = self.moe_every > 0 and (index + 1) % self.moe_every == 0 and index >= self.first_dense
        return LayerConfig(
            feed_forward=FeedForward.moe if moe else FeedForward.dense,
            rope=not nope,
            attention_chunk_size=None if nope else self.attention_chunk_size,
            temperature=nope and self.temperature,
            qk_norm=QKNorm.none if nope and self.qk_norm is QKNorm.weightless else self.qk_norm,
        )
