"""Model families: translate their `config.json` to a `ModelConfig` and back.

A `config.json` that we write is checked by reading it again. Whatever the family cannot express shows up as a
difference, so no family lists what it does not support.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from core.config import differences, plain
from core.errors import ConfigError
from model.config import (
    FeedForward,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    QKNorm,
    RopePairing,
    RopeScaling,
    RouterConfig,
    Score,
    WeightsOn,
    YarnScaling,
)
from model.huggingface.block_fp8 import check_quantization
from model.huggingface.locations import MoENames
from model.huggingface.values import Json, layer_count, whole_number
from model.huggingface.vision import read_vision, write_vision


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers. `read` and `write` translate its `config.json`, without the architecture."""

    model_type: str
    architecture: str
    names: MoENames
    read: Callable[[Json], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]


def read_config(config: Json, text_only: bool = False) -> tuple[Family, ModelConfig]:
    """Return family and model of a parsed `config.json`. Raises `ConfigError` for an unsupported or invalid setting.

    `text_only` drops the vision encoder.
    """
    check_quantization(config)
    if config.get("model_type") == "llama4" and text_only:
        config = {"model_type": "llama4_text", **_text_config(config)}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError("config.json model_type", str(kind), "is not a supported architecture", list(FAMILIES))
    try:
        _refuse(_text_config(config) if kind == "llama4" else config)
        return FAMILIES[kind], compact(FAMILIES[kind].read(config))
    except KeyError as error:
        raise ConfigError("config.json", None, f"lacks {error}") from error
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise ConfigError("config.json", None, f"has an invalid value ({error})") from error


def write_config(model: ModelConfig, family: str | None = None) -> tuple[Family, dict[str, Any]]:
    """Return the first family that expresses the model exactly, and its `config.json`. Tries only `family` if given."""
    if family is not None and family not in FAMILIES:
        raise ConfigError("family", family, "is not a supported architecture", list(FAMILIES))
    reasons = []
    for candidate in [FAMILIES[family]] if family else FAMILIES.values():
        kind = {"architectures": [candidate.architecture], "model_type": candidate.model_type}
        config = {**kind, **candidate.write(model)}
        lost = _lost(model, candidate, config)
        if lost is None:
            return candidate, config
        reasons.append(f"{candidate.model_type} cannot express {lost}")
    raise ConfigError("family", family, f"no family expresses this model exactly: {'; '.join(reasons)}")


def _lost(model: ModelConfig, family: Family, written: Json) -> str | None:
    """Return the first key that changes when the model is written and read again, or None."""
    try:
        back = family.read(written)
    except ConfigError as error:
        return str(error)
    return next((f"model.{key}={before}" for key, (before, _) in model_differences(model, back).items()), None)


def model_differences(first: ModelConfig, second: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys by which two models compute different functions of their weights, with both values."""
    trees = []
    for model in (first, second):
        tree = plain(canonical(model))
        trees.append({**tree, "layer_list": dict(enumerate(tree["layer_list"]))})
    return differences(trees[0], trees[1])


def canonical(model: ModelConfig) -> ModelConfig:
    """Return a model that computes the same function, with explicit layers and defaults for keys without effect."""
    layers, default = model.blocks, ModelConfig()
    kinds = {layer.feed_forward for layer in layers}
    idle = [
        "moe_every",
        "first_dense",
        "nope_every",
        "attention_chunk_size",
        "qk_norm",
        "temperature",
    ]  # layer_list has them
    idle += ["balance", "init", "init_from", "init_parts", "upcycle"]
    if FeedForward.moe not in kinds:
        idle += ["num_experts", "expert_hidden_size", "shared_expert_hidden_size", "router"]
    if FeedForward.dense not in kinds:
        idle += ["dense_hidden_size"]
    if not any(layer.temperature for layer in layers):
        idle += ["temperature_floor", "temperature_scale"]
    explicit = replace(model, shared_expert_hidden_size=model.shared_hidden_size, layer_list=list(layers))
    return replace(explicit, **{key: getattr(default, key) for key in idle})


def compact(model: ModelConfig) -> ModelConfig:
    """Return the same model with the shortest description of its layers."""
    layers = model.blocks
    rotated = next((layer for layer in layers if layer.rope), layers[0])
    nope_every = next((number for number, layer in enumerate(layers, 1) if not layer.rope), 0)
    shorter = replace(
        model,
        moe_every=next((n for n, layer in enumerate(layers, 1) if layer.feed_forward is FeedForward.moe), 0),
        nope_every=nope_every,
        attention_chunk_size=rotated.attention_chunk_size,
        qk_norm=rotated.qk_norm,
        temperature=nope_every > 0 and layers[nope_every - 1].temperature,
        layer_list=None,
    )
    first = next((index for index, layer in enumerate(layers) if layer.feed_forward is FeedForward.moe), 0)
    later = replace(shorter, moe_every=1, first_dense=first)
    return next((one for one in (shorter, later) if one.blocks == layers), replace(model, layer_list=list(layers)))


def _refuse(config: Json) -> None:
    """Reject settings of published configurations that are not supported."""
    for key in ("attention_bias", "mlp_bias", "clip_qkv", "use_sliding_window"):
        if config.get(key):
            raise ConfigError(f"config.json {key}", config[key], "is not supported")
    if config.get("sliding_window") and config.get("model_type") in ("mixtral", "llama"):
        raise ConfigError("config.json sliding_window", config["sliding_window"], "is not supported")
    plain_types = config.get("model_type") not in ("llama4_text", None)
    if plain_types and set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ConfigError("config.json layer_types", None, "must all be full_attention")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError("config.json hidden_act", config["hidden_act"], "is not supported", ["silu"])


def _rope(config: Json, default_theta: float) -> dict[str, Any]:
    """Read `rope_parameters`, or `rope_theta` and `rope_scaling` in older files. If a file has both, they must agree:
    transformers 4 reads the older keys, and in transformers 5 `rope_scaling` replaces `rope_parameters`.
    """
    given = [rope for key in ("rope_parameters", "rope_scaling") if (rope := config.get(key))]
    first, *others = [_rope_of(rope, config, default_theta) for rope in given or [{}]]
    if others not in ([], [first]):
        raise ConfigError("config.json rope_scaling", None, "contradicts rope_parameters")
    return first


def _rope_of(rope: Json, config: Json, default_theta: float) -> dict[str, Any]:
    outside = config.get("rope_theta")
    theta = float(rope.get("rope_theta") or outside or default_theta)
    if outside and outside != theta:
        raise ConfigError("config.json rope_theta", outside, f"contradicts rope_parameters, which says {theta:g}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    turned = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if turned != 1.0:
        raise ConfigError("config.json partial_rotary_factor", turned, "is not supported", [1.0])
    none: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None, "rope_yarn": None}
    match kind:
        case "default":
            return none
        case "llama3":
            return none | {"rope_scaling": _llama3(rope)}
        case "yarn":
            return none | {"rope_yarn": _yarn(rope)}
    raise ConfigError("config.json rope_type", kind, "is not supported", ["default", "llama3", "yarn"])


def _llama3(rope: Json) -> RopeScaling:
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_seq_len=whole_number(rope, "original_max_position_embeddings"),
    )


def _yarn(rope: Json) -> YarnScaling:
    if rope.get("attention_factor") is not None:
        raise ConfigError("config.json attention_factor", rope["attention_factor"], "is not supported: remove it")
    return YarnScaling(
        factor=float(rope["factor"]),
        original_seq_len=whole_number(rope, "original_max_position_embeddings"),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 0),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
        truncate=bool(rope.get("truncate", True)),
    )


def _indices(config: Json, key: str, layers: int) -> set[int] | None:
    """Return the layers in the list at `key`, or None without such a key."""
    given = config.get(key)
    if given is None:
        return None
    if not isinstance(given, list) or not all(type(index) is int and 0 <= index < layers for index in given):
        raise ConfigError(f"config.json {key}", None, f"must list layers between 0 and {layers - 1}")
    return set(given)


def _read_common(config: Json, theta: float, eps: float) -> dict[str, Any]:
    heads, width = whole_number(config, "num_attention_heads"), whole_number(config, "hidden_size")
    return {
        "vocab_size": whole_number(config, "vocab_size"),
        "hidden_size": width,
        "num_layers": layer_count(config),
        "num_heads": heads,
        "num_kv_heads": whole_number(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads,
        "head_dim": whole_number(config, "head_dim") if config.get("head_dim") else width // heads,
        "norm_eps": float(config.get("rms_norm_eps", eps)),
        **_rope(config, theta),
    }


def _write_common(model: ModelConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if model.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_scaling.factor,
            "low_freq_factor": model.rope_scaling.low_freq_factor,
            "high_freq_factor": model.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": model.rope_scaling.original_seq_len,
        }
    if (yarn := model.rope_yarn) is not None:
        scaling = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_seq_len,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
            "truncate": yarn.truncate,
        }
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,  # transformers 4 reads this and rope_scaling, transformers 5 rope_parameters
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": model.rope_theta},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def _read_llama4(config: Json) -> ModelConfig:
    common = _read_common(config, theta=500000.0, eps=1e-5)
    count = common["num_layers"]
    every, interval = (
        whole_number(config, "interleave_moe_layer_step", 1),
        whole_number(config, "no_rope_layer_interval", 4),
    )
    moe_layers = _indices(config, "moe_layers", count)
    if moe_layers is None:
        moe_layers = set(range(every - 1, count, every))
    rotated = config.get("no_rope_layers") or [int((index + 1) % interval != 0) for index in range(count)]
    if not isinstance(rotated, list) or len(rotated) != count or any(turned not in (0, 1) for turned in rotated):
        raise ConfigError("config.json no_rope_layers", None, f"must say 0 or 1 for each of {count} layers")
    chunk = (
        None if config.get("attention_chunk_size", 0) is None else whole_number(config, "attention_chunk_size", 8192)
    )
    if config.get("layer_types") == (full := ["full_attention"] * count):
        chunk = None  # no layer uses the size
    derived = ["chunked_attention" if turned else "full_attention" for turned in rotated]
    if config.get("layer_types") not in (None, derived, full):
        raise ConfigError("config.json layer_types", None, "contradict no_rope_layers")
    norm = bool(config.get("use_qk_norm", True))
    tuned = bool(config.get("attn_temperature_tuning", True))  # the first published files have 4 instead of true
    layers = [
        LayerConfig(
            feed_forward=FeedForward.moe if index in moe_layers else FeedForward.dense,
            rope=bool(rotated[index]),
            attention_chunk_size=chunk if rotated[index] else None,
            temperature=tuned and not rotated[index],
            qk_norm=QKNorm.weightless if norm and rotated[index] else QKNorm.none,
        )
        for index in range(count)
    ]
    return ModelConfig(
        **common,
        dense_hidden_size=whole_number(config, "intermediate_size_mlp", 16384),
        expert_hidden_size=whole_number(config, "intermediate_size"),
        num_experts=whole_number(config, "num_local_experts", 16),
        router=RouterConfig(top_k=whole_number(config, "num_experts_per_tok", 1)),
        temperature_floor=float(config.get("floor_scale", 8192)),
        temperature_scale=float(config.get("attn_scale", 0.1)),
        layer_list=layers,
    )


def _text_config(config: Json) -> Json:
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError("config.json", None, "has no text_config")
    return text


def _read_llama4_with_vision(config: Json) -> ModelConfig:
    text = _text_config(config)
    if (kind := text.get("model_type", "llama4_text")) != "llama4_text":
        raise ConfigError("config.json text_config.model_type", str(kind), "is not supported", ["llama4_text"])
    return replace(_read_llama4(text), vision=read_vision(config))


def _write_llama4_with_vision(model: ModelConfig) -> dict[str, Any]:
    text = {"text_config": {"model_type": "llama4_text", **_write_llama4(model)}}
    return text if model.vision is None else {**text, **write_vision(model.vision)}


def _write_llama4(model: ModelConfig) -> dict[str, Any]:
    layers = model.blocks
    rotated = [layer for layer in layers if layer.rope]
    chunk = rotated[0].attention_chunk_size if rotated else None
    return {
        **_write_common(model),
        # without types, transformers takes layers with rotary positions as chunked
        **({} if chunk else {"layer_types": ["full_attention"] * len(layers)}),
        "intermediate_size": model.expert_hidden_size,
        "intermediate_size_mlp": model.dense_hidden_size,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.router.top_k,
        "interleave_moe_layer_step": 1,
        "moe_layers": [index for index, layer in enumerate(layers) if layer.feed_forward is FeedForward.moe],
        "no_rope_layers": [int(layer.rope) for layer in layers],
        "attention_chunk_size": chunk or 8192,  # transformers 5.23 wants a size even if no layer uses it
        "use_qk_norm": any(layer.qk_norm is QKNorm.weightless for layer in rotated),
        "attn_temperature_tuning": any(layer.temperature for layer in layers),
        "floor_scale": int(model.temperature_floor),
        "attn_scale": model.temperature_scale,
    }


def _plain_layers(model: dict[str, Any], moe_layers: Sequence[int], norm: QKNorm) -> dict[str, Any]:
    """Add layers with full causal attention, and RoPE pairs in halves, to the settings `model`."""
    chosen = set(moe_layers)
    layers = [
        LayerConfig(feed_forward=FeedForward.moe if index in chosen else FeedForward.dense, qk_norm=norm)
        for index in range(model["num_layers"])
    ]
    return {**model, "layer_list": layers, "rope_pairing": RopePairing.halves, "shared_expert_hidden_size": 0}


def _softmax(top_k: int, norm_topk_prob: bool) -> RouterConfig:
    return RouterConfig(top_k=top_k, score=Score.softmax, norm_topk_prob=norm_topk_prob, weights_on=WeightsOn.output)


def _read_mixtral(config: Json) -> ModelConfig:
    common = _read_common(config, theta=1e6, eps=1e-5)
    return ModelConfig(
        **_plain_layers(common, range(common["num_layers"]), QKNorm.none),
        expert_hidden_size=whole_number(config, "intermediate_size"),
        num_experts=whole_number(config, "num_local_experts", 8),
        router=_softmax(whole_number(config, "num_experts_per_tok", 2), norm_topk_prob=True),
    )


def _write_mixtral(model: ModelConfig) -> dict[str, Any]:
    return {
        **_write_common(model),
        "intermediate_size": model.expert_hidden_size,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.router.top_k,
        "sliding_window": None,
    }


def _read_qwen3_moe(config: Json) -> ModelConfig:
    common = _read_common(config, theta=10000.0, eps=1e-6)
    every, count = whole_number(config, "decoder_sparse_step", 1), common["num_layers"]
    dense = _indices(config, "mlp_only_layers", count) or set()
    moe_layers = [index for index in range(every - 1, count, every) if index not in dense] if every > 0 else []
    return ModelConfig(
        **_plain_layers(common, moe_layers, QKNorm.per_head),
        dense_hidden_size=whole_number(config, "intermediate_size", 6144),
        expert_hidden_size=whole_number(config, "moe_intermediate_size"),
        num_experts=whole_number(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        router=_softmax(whole_number(config, "num_experts_per_tok"), bool(config.get("norm_topk_prob", False))),
    )


def _write_qwen3_moe(model: ModelConfig) -> dict[str, Any]:
    return {
        **_write_common(model),
        "intermediate_size": model.dense_hidden_size,
        "moe_intermediate_size": model.expert_hidden_size,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.router.top_k,
        "norm_topk_prob": model.router.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(model.blocks) if layer.feed_forward is FeedForward.dense],
        "use_sliding_window": False,
    }


def _read_olmoe(config: Json) -> ModelConfig:
    common = _read_common(config, theta=10000.0, eps=1e-5)
    return ModelConfig(
        **_plain_layers(common, range(common["num_layers"]), QKNorm.full),
        expert_hidden_size=whole_number(config, "intermediate_size"),
        num_experts=whole_number(config, "num_experts", 64),
        router=_softmax(whole_number(config, "num_experts_per_tok", 8), bool(config.get("norm_topk_prob", False))),
    )


def _write_olmoe(model: ModelConfig) -> dict[str, Any]:
    return {
        **_write_common(model),
        "intermediate_size": model.expert_hidden_size,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.router.top_k,
        "norm_topk_prob": model.router.norm_topk_prob,
        "clip_qkv": None,
    }


def _read_deepseek_v3(config: Json) -> ModelConfig:
    only = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "num_nextn_predict_layers": 0}
    for key, value in only.items():
        if config.get(key, value) != value:
            raise ConfigError(f"config.json {key}", config[key], "is not supported", [value])
    common = _read_common({**config, "head_dim": None}, theta=10000.0, eps=1e-6)
    turned = whole_number(config, "qk_rope_head_dim", 64)
    expert = whole_number(config, "moe_intermediate_size", 2048)
    latent = LatentConfig(
        kv_rank=whole_number(config, "kv_lora_rank", 512),
        query_rank=None if config.get("q_lora_rank", 0) is None else whole_number(config, "q_lora_rank", 1536),
        rope_dim=turned,
        value_dim=whole_number(config, "v_head_dim", 128),
    )
    router = RouterConfig(
        top_k=whole_number(config, "num_experts_per_tok", 8),
        norm_topk_prob=bool(config.get("norm_topk_prob", True)),
        scale=float(config.get("routed_scaling_factor", 2.5)),
        weights_on=WeightsOn.output,
        groups=whole_number(config, "n_group", 8),
        top_groups=whole_number(config, "topk_group", 4),
        selection_bias=True,
    )
    if router.groups == router.top_groups:
        router = replace(router, groups=1, top_groups=1)
    first = 0 if config.get("first_k_dense_replace") == 0 else whole_number(config, "first_k_dense_replace", 3)
    count = common["num_layers"]
    kinds = [FeedForward.dense if index < first else FeedForward.moe for index in range(count)]
    pairing = RopePairing.adjacent if config.get("rope_interleave", True) else RopePairing.halves
    return ModelConfig(
        **{**common, "head_dim": whole_number(config, "qk_nope_head_dim", 128) + turned},
        latent=latent,
        dense_hidden_size=whole_number(config, "intermediate_size", 18432),
        expert_hidden_size=expert,
        shared_expert_hidden_size=whole_number(config, "n_shared_experts", 1) * expert,
        num_experts=whole_number(config, "n_routed_experts", 256),
        router=router,
        rope_pairing=pairing,
        layer_list=[LayerConfig(kind) for kind in kinds],
    )


def _write_deepseek_v3(model: ModelConfig) -> dict[str, Any]:
    latent = model.latent or LatentConfig()
    kinds = [layer.feed_forward for layer in model.blocks]
    return {
        **_write_common(model),
        "head_dim": latent.rope_dim,
        "qk_nope_head_dim": model.head_dim - latent.rope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.query_rank,
        "rope_interleave": model.rope_pairing is RopePairing.adjacent,
        "intermediate_size": model.dense_hidden_size,
        "moe_intermediate_size": model.expert_hidden_size,
        "n_shared_experts": model.shared_hidden_size // model.expert_hidden_size,
        "n_routed_experts": model.num_experts,
        "num_experts_per_tok": model.router.top_k,
        "norm_topk_prob": model.router.norm_topk_prob,
        "routed_scaling_factor": model.router.scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": model.router.groups,
        "topk_group": model.router.top_groups,
        "first_k_dense_replace": kinds.index(FeedForward.moe) if FeedForward.moe in kinds else len(kinds),
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }


def _read_dense(norm: QKNorm, config: Json) -> ModelConfig:
    common = _read_common(config, theta=10000.0, eps=1e-6)
    return ModelConfig(**_plain_layers(common, (), norm), dense_hidden_size=whole_number(config, "intermediate_size"))


def _write_dense(model: ModelConfig) -> dict[str, Any]:
    return {**_write_common(model), "intermediate_size": model.dense_hidden_size}


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_QWEN = MoENames("mlp", "gate.weight", _PROJECTIONS)
_DEEPSEEK = MoENames("mlp", "gate.weight", _PROJECTIONS, shared="shared_experts", bias="gate.e_score_correction_bias")
_LLAMA4 = MoENames("feed_forward", "router.weight", _PROJECTIONS, dense="feed_forward", fused=True)

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _QWEN, partial(_read_dense, QKNorm.none), _write_dense),
        Family("qwen3", "Qwen3ForCausalLM", _QWEN, partial(_read_dense, QKNorm.per_head), _write_dense),
        Family("llama4_text", "Llama4ForCausalLM", _LLAMA4, _read_llama4, _write_llama4),
        Family(
            "llama4",
            "Llama4ForConditionalGeneration",
            _LLAMA4,
            _read_llama4_with_vision,
            _write_llama4_with_vision,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            MoENames("block_sparse_moe", "gate.weight", ("w1", "w3", "w2")),
            _read_mixtral,
            _write_mixtral,
        ),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN, _read_qwen3_moe, _write_qwen3_moe),
        Family("olmoe", "OlmoeForCausalLM", _QWEN, _read_olmoe, _write_olmoe),
        Family("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK, _read_deepseek_v3, _write_deepseek_v3),
        Family("kimi_k2", "DeepseekV3ForCausalLM", _DEEPSEEK, _read_deepseek_v3, _write_deepseek_v3),
    )
}
