"""The shape of a model. Sugar (`moe_every`, `nope_every`, ...) only builds the explicit list of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from core.errors import ConfigError, check_numbers, divisors


class FeedForward(Enum):
    dense = "dense"
    moe = "moe"


class QKNorm(Enum):
    none = "none"
    weightless = "weightless"
    """Llama 4: root-mean-square over the head, after the rotation, no gain; rotated layers only."""
    per_head = "per_head"
    """Qwen 3: over the head, before the rotation, one gain for all heads."""
    full = "full"
    """OLMoE: over all heads together, before the rotation, with a gain."""


class RopePairing(Enum):
    """Which two elements of a head turn together: (2j, 2j + 1) in Llama 4, (j, j + K/2) in most others."""

    adjacent = "adjacent"
    halves = "halves"


class Score(Enum):
    sigmoid = "sigmoid"
    softmax = "softmax"


class WeightsOn(Enum):
    """Whether a routing weight scales the expert's input (Llama 4: it acts through the SiLU) or its output."""

    input = "input"
    output = "output"


class AuxScope(Enum):
    """Over which tokens the load in the balancing loss is counted.

    `sequence`: each row by itself, exact under every layout. `whole`: the whole last step's batch, frozen (a pipeline
    has no other at its first backward pass). `micro`: each micro-batch, so it depends on how the batch is cut.
    """

    sequence = "sequence"
    whole = "whole"
    micro = "micro"


@dataclass(frozen=True)
class LayerConfig:
    """One transformer layer, explicitly."""

    feed_forward: FeedForward = FeedForward.dense
    rope: bool = True
    attention_chunk_size: int | None = None
    """Attention stays within chunks of this many positions, counted from the document's start. None: full causal."""
    temperature: bool = False
    qk_norm: QKNorm = QKNorm.none

    def __post_init__(self) -> None:
        if self.attention_chunk_size is not None and self.attention_chunk_size < 1:
            raise ConfigError(
                "attention_chunk_size", self.attention_chunk_size, "must be positive, or null for full attention"
            )


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are stretched by `factor`, short ones kept, a blend between."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_seq_len: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor <= self.high_freq_factor):
            raise ConfigError("factor", self.factor, "needs factor >= 1 and 0 < low <= high")


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts. The defaults are Llama 4's."""

    top_k: int = 1
    score: Score = Score.sigmoid
    norm_topk_prob: bool = False
    scale: float = 1.0
    weights_on: WeightsOn = WeightsOn.input
    force_balanced: bool = False
    """Tokens go to experts in turn, whatever the router says: for benchmarks only."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("scale",))
        if self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "a token needs at least one expert", [1, 2])


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps the experts' loads even. Any subset; a coefficient of 0 switches its term off.

    `bias_rate`: selection bias without auxiliary loss (Wang et al. 2024, arXiv 2408.15664): after each step an expert's
    bias moves by this much against its load's deviation from the mean. `aux`: E * sum_e load_e * probability_e, mean
    over tokens (Fedus et al. 2021, section 2.2). `z`: squared log-sum-exp of the logits, mean over tokens (Zoph et al.
    2022, section 3.1).
    """

    bias_rate: float = 0.0
    aux: float = 0.0
    aux_scope: AuxScope = AuxScope.sequence
    z: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("bias_rate", "aux", "z"))


@dataclass(frozen=True)
class InitConfig:
    """Initial weights: normal with `std`, or `std / sqrt(fan_in)` where `fan_in` is set.

    `embedding_std`, `head_std` and `router_std` stand by themselves (None: `std`); `depth_scaled` divides what is
    written to the residual stream by sqrt(2 * layers) (Radford et al. 2019, section 2.3).
    """

    std: float = 0.02
    fan_in: bool = False
    embedding_std: float | None = None
    head_std: float | None = None
    router_std: float | None = None
    depth_scaled: bool = False
    roles: dict[str, float] = field(default_factory=dict)
    """Absolute standard deviations by role (`query`, `router`, ...), before all of the above. Written by MetaP."""

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("std", "embedding_std", "head_std", "router_std"))
        for role, std in self.roles.items():
            if not (math.isfinite(std) and std >= 0):
                raise ConfigError(f"roles.{role}", std, "must not be negative")


@dataclass(frozen=True)
class MultipliersConfig:
    """Constant factors of the forward pass; at 1 the model is the published one. MetaP sets them, they travel with the
    model, and `model.multipliers` folds them into weights.
    """

    residual: float = 1.0
    """On what attention and feed-forward add to the residual stream."""
    logits: float = 1.0
    attention: float = 1.0
    """On the queries, beside 1 / sqrt(head_dim)."""
    gates: float = 1.0
    """On the sum of the routed experts."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("residual", "logits", "attention", "gates"))


class UpcycleMethod(Enum):
    """How a dense layer becomes experts.

    `copy`: each expert is the dense layer (Komatsuzaki et al. 2022, arXiv 2212.05055); where there is a shared expert
    that one takes the dense layer over and the routed ones begin with a zero down projection. `split`: an expert is a
    slice of the dense layer's width, and routers start so that a token gets whole sets of slices (He et al. 2024,
    arXiv 2410.07524). `noise`: as `copy`, plus normal noise on every expert's weights, so that they differ.
    """

    copy = "copy"
    split = "split"
    noise = "noise"


@dataclass(frozen=True)
class UpcycleConfig:
    """`model.init_from` is a dense checkpoint and the model a mixture of experts."""

    method: UpcycleMethod = UpcycleMethod.copy
    noise_std: float = 0.01
    """Absolute, of the method `noise`."""

    def __post_init__(self) -> None:
        if self.noise_std < 0:
            raise ConfigError("noise_std", self.noise_std, "must not be negative", [0.01])


@dataclass(frozen=True)
class ModelConfig:
    """A Llama 4 decoder. Sizes are in elements, `attention_chunk_size` and `temperature_floor` in positions."""

    vocab_size: int = 202048
    hidden_size: int = 5120
    num_layers: int = 48
    num_heads: int = 40
    num_kv_heads: int = 8
    head_dim: int = 128
    dense_hidden_size: int = 16384
    expert_hidden_size: int = 8192
    shared_expert_hidden_size: int | None = None
    """Width of the shared expert; None: as wide as a routed one; 0: none."""
    num_experts: int = 16
    moe_every: int = 1
    """Layers whose (index + 1) is a multiple of this are mixtures of experts; 0: none."""
    nope_every: int = 4
    """Layers whose (index + 1) is a multiple of this have no rotary position and see the whole document; 0: none."""
    attention_chunk_size: int | None = 8192
    qk_norm: QKNorm = QKNorm.weightless
    rope_theta: float = 500000.0
    rope_pairing: RopePairing = RopePairing.adjacent
    rope_scaling: RopeScaling | None = None
    temperature: bool = True
    """NoPE layers scale their queries by 1 + temperature_scale * ln(1 + floor((p + 1) / temperature_floor))."""
    temperature_floor: float = 8192.0
    temperature_scale: float = 0.1
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    """The head multiplies with the embedding's table; it has no weight of its own."""
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    init: InitConfig = field(default_factory=InitConfig)
    multipliers: MultipliersConfig = field(default_factory=MultipliersConfig)
    layer_list: list[LayerConfig] | None = None
    """The layers one by one. None: built from the sugar above."""
    init_from: str | None = None
    """Start from this checkpoint: a directory in the Hugging Face format, an imported one, or a run."""
    upcycle: UpcycleConfig | None = None
    """Make experts out of the dense layers of `init_from`."""

    def __post_init__(self) -> None:
        for key in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "dense_hidden_size",
            "expert_hidden_size",
        ):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be positive")
        check_numbers(
            self, ("rope_theta", "temperature_floor", "norm_eps"), ("shared_expert_hidden_size", "temperature_scale")
        )
        if self.num_heads % self.num_kv_heads:
            legal = divisors(self.num_heads)
            raise ConfigError("num_kv_heads", self.num_kv_heads, f"must divide the {self.num_heads} query heads", legal)
        if self.head_dim % 2:
            raise ConfigError("head_dim", self.head_dim, "must be even: the rotation works on pairs")
        for key in ("moe_every", "nope_every"):
            if getattr(self, key) < 0:
                raise ConfigError(key, getattr(self, key), "must not be negative; 0 switches it off")
        if self.attention_chunk_size is not None and self.attention_chunk_size < 1:
            raise ConfigError(
                "attention_chunk_size",
                self.attention_chunk_size,
                "must be positive, or null for full attention in every layer",
            )
        if self.layer_list is not None and len(self.layer_list) != self.num_layers:
            reason = f"names {len(self.layer_list)} layers but model.num_layers is {self.num_layers}"
            raise ConfigError("layer_list", None, reason)
        if self.has_experts:
            self._check_experts()
        if self.upcycle is not None and self.init_from is None:
            raise ConfigError("upcycle", None, "needs a dense checkpoint to start from: set init_from")

    def _check_experts(self) -> None:
        if self.num_experts < 2:
            raise ConfigError(
                "num_experts", self.num_experts, "a mixture needs at least 2; moe_every=0 makes every layer dense"
            )
        if self.router.top_k > self.num_experts:
            raise ConfigError("router.top_k", self.router.top_k, f"must not exceed the {self.num_experts} experts")
        if self.hidden_size % 8 or self.expert_hidden_size % 8:
            # 16-byte rows are what the grouped product's kernels need in bfloat16
            key = "hidden_size" if self.hidden_size % 8 else "expert_hidden_size"
            raise ConfigError(key, getattr(self, key), "must be a multiple of 8 for the grouped product")

    @property
    def blocks(self) -> list[LayerConfig]:
        """The explicit list of layers."""
        if self.layer_list is not None:
            return self.layer_list
        return [self._layer(i) for i in range(self.num_layers)]

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture."""
        return any(layer.feed_forward is FeedForward.moe for layer in self.blocks)

    @property
    def shared_hidden_size(self) -> int:
        return self.expert_hidden_size if self.shared_expert_hidden_size is None else self.shared_expert_hidden_size

    def _layer(self, index: int) -> LayerConfig:
        nope = self.nope_every > 0 and (index + 1) % self.nope_every == 0
        moe = self.moe_every > 0 and (index + 1) % self.moe_every == 0
        return LayerConfig(
            feed_forward=FeedForward.moe if moe else FeedForward.dense,
            rope=not nope,
            attention_chunk_size=None if nope else self.attention_chunk_size,
            temperature=nope and self.temperature,
            qk_norm=QKNorm.none if nope and self.qk_norm is QKNorm.weightless else self.qk_norm,
        )
