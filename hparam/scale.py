"""Describe the sizes of a model, of its run and of each role's matrix.

Scaling rules use the ratio of each size in a target to the same size in its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from core.errors import ConfigError
from model.config import FeedForward, ModelConfig
from model.roles import ParameterInfo, Role
from model.vision.config import SHUFFLE, VisionConfig

_OF_PARTS = (
    *("query_rank", "latent_rank", "latent_down_width", "latent_up_width"),
    *("vision_hidden_size", "vision_mlp_hidden_size", "vision_adapter_hidden_size", "vision_patch_values"),
)
"""Sizes of latent attention and of the vision encoder, which a model may lack."""
_MAY_BE_ABSENT = (
    *("dense_hidden_size", "shared_expert_hidden_size", "expert_hidden_size", "num_experts", "top_k", "result_width"),
    *_OF_PARTS,
)


@dataclass(frozen=True)
class Scale:
    """Sizes of a whole model and its run, not of a rank's shard. `batch` is the number of tokens in an optimizer
    step, and `tokens` the number in the run. Sizes of layers that the model lacks are 0.
    """

    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Number of transformer layers."""
    head_dim: int
    """Width of one attention head."""
    query_width: int
    """Width of all query heads together."""
    value_width: int
    """Width of all value heads together; all key heads together are equally wide."""
    dense_hidden_size: int
    """Hidden size of the dense feed-forward layers; 0: the model has none."""
    shared_expert_hidden_size: int
    """Hidden size of the shared expert; 0: the model has none."""
    expert_hidden_size: int
    """Hidden size of a routed expert; 0: the model has none."""
    num_experts: int
    """Routed experts per MoE layer; 0: the model has none."""
    top_k: int
    """Routed experts per token; 0: the model has none."""
    batch: int
    """Tokens per optimizer step: global_batch_size * seq_len."""
    tokens: int
    """Tokens of the whole run."""
    query_rank: int = 0
    """Width from which latent attention projects queries up; 0: none."""
    latent_rank: int = 0
    """Width from which latent attention projects keys and values up; 0: none."""
    latent_down_width: int = 0
    """Width of latent attention's projection down for keys and values, with the rotated part of keys; 0: none."""
    latent_up_width: int = 0
    """Width of all heads' keys, without the rotated part, and values in latent attention; 0: none."""
    result_width: int = 0
    """Width of all heads' results in latent attention; 0: none, results are as wide as queries."""
    vision_hidden_size: int = 0
    """Width of the vision encoder; 0: the model has none."""
    vision_mlp_hidden_size: int = 0
    """Hidden size of the encoder's feed-forward layers; 0: the model has none."""
    vision_adapter_hidden_size: int = 0
    """Width of the adapter between encoder and decoder; 0: the model has none."""
    vision_patch_values: int = 0
    """Values of a patch; 0: the model has none."""

    def __post_init__(self) -> None:
        for one in fields(self):
            least = 0 if one.name in _MAY_BE_ABSENT else 1
            if getattr(self, one.name) < least:
                raise ConfigError(one.name, getattr(self, one.name), f"must be at least {least}")

    @property
    def steps(self) -> float:
        return self.tokens / self.batch


def scale_of(model: ModelConfig, batch: int, tokens: int) -> Scale:
    """Return the sizes of a model and its run. `batch` and `tokens` are in tokens."""
    dense = any(layer.feed_forward is FeedForward.dense for layer in model.blocks)
    moe = model.has_experts
    return Scale(
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        head_dim=model.head_dim,
        query_width=model.num_heads * model.head_dim,
        value_width=model.num_kv_heads * model.head_dim,
        **_latent_sizes(model),
        dense_hidden_size=model.dense_hidden_size if dense else 0,
        shared_expert_hidden_size=model.shared_hidden_size if moe else 0,
        expert_hidden_size=model.expert_hidden_size if moe else 0,
        num_experts=model.num_experts if moe else 0,
        top_k=model.router.top_k if moe else 0,
        batch=batch,
        tokens=tokens,
        **_vision_sizes(model.vision),
    )


def _latent_sizes(model: ModelConfig) -> dict[str, int]:
    latent = model.latent
    if latent is None:
        return {}
    return {
        "query_rank": latent.query_rank or 0,
        "latent_rank": latent.kv_rank,
        "latent_down_width": latent.kv_rank + latent.rope_dim,
        "latent_up_width": model.num_heads * (model.head_dim - latent.rope_dim + latent.value_dim),
        "result_width": model.num_heads * latent.value_dim,
    }


def _vision_sizes(vision: VisionConfig | None) -> dict[str, int]:
    if vision is None:
        return {}
    return {
        "vision_hidden_size": vision.hidden_size,
        "vision_mlp_hidden_size": vision.mlp_hidden_size,
        "vision_adapter_hidden_size": vision.adapter_hidden_size,
        "vision_patch_values": vision.patch_values,
    }


def kind_of(model: ModelConfig) -> dict[str, str]:
    """Return architecture choices other than size. Hyperparameters transfer only between models with equal choices."""
    found = {
        "norms": "+".join(sorted({layer.qk_norm.value for layer in model.blocks})),
        "tied": str(model.tie_embeddings).lower(),
    }
    if model.latent is not None:
        found["attention"] = "latent" if model.latent.query_rank is None else "latent, with latent queries"
    if model.has_experts:
        found |= model.router.kind()
    return found


SPANS: Mapping[Role, tuple[str | None, str]] = {
    Role.embedding: (None, "hidden_size"),
    Role.head: (None, "hidden_size"),
    Role.query: ("query_width", "hidden_size"),
    Role.key: ("value_width", "hidden_size"),
    Role.value: ("value_width", "hidden_size"),
    Role.query_down: ("query_rank", "hidden_size"),
    Role.query_up: ("query_width", "query_rank"),
    Role.latent_down: ("latent_down_width", "hidden_size"),
    Role.latent_up: ("latent_up_width", "latent_rank"),
    Role.attention_output: ("hidden_size", "query_width"),
    Role.dense_gate: ("dense_hidden_size", "hidden_size"),
    Role.dense_up: ("dense_hidden_size", "hidden_size"),
    Role.dense_down: ("hidden_size", "dense_hidden_size"),
    Role.shared_gate: ("shared_expert_hidden_size", "hidden_size"),
    Role.shared_up: ("shared_expert_hidden_size", "hidden_size"),
    Role.shared_down: ("hidden_size", "shared_expert_hidden_size"),
    Role.expert_gate_up: ("expert_hidden_size", "hidden_size"),
    Role.expert_down: ("hidden_size", "expert_hidden_size"),
    Role.router: ("num_experts", "hidden_size"),
    Role.vision_patch: ("vision_hidden_size", "vision_patch_values"),
    Role.vision_position: (None, "vision_hidden_size"),
    **dict.fromkeys(
        (Role.vision_query, Role.vision_key, Role.vision_value, Role.vision_output),
        ("vision_hidden_size", "vision_hidden_size"),
    ),
    Role.vision_up: ("vision_mlp_hidden_size", "vision_hidden_size"),
    Role.vision_down: ("vision_hidden_size", "vision_mlp_hidden_size"),
    Role.adapter_in: ("vision_adapter_hidden_size", "vision_hidden_size"),
    Role.adapter_out: ("vision_adapter_hidden_size", "vision_adapter_hidden_size"),
    Role.projector: ("hidden_size", "vision_adapter_hidden_size"),
}
"""Fan out and fan in of each role's matrix. A fan out of None is the vocabulary, or the patches of a tile, whose sizes
no rule uses. The adapter's input is `SHUFFLE`^2 encoder widths.
"""


def fan_in(role: Role, sizes: Mapping[str, int]) -> int:
    """Return the fan in of a role's matrix, given the sizes by name."""
    if role is Role.attention_output and sizes.get("result_width"):
        return sizes["result_width"]
    return sizes[SPANS[role][1]] * (SHUFFLE**2 if role is Role.adapter_in else 1)


def ratios(base: Scale, target: Scale, role: Role | None = None) -> dict[str, float]:
    """Return target / base for every size that both have and, given a role, for `fan_in`, `fan_out` and `larger`,
    the larger of the two. The ratios of a vision encoder or of latent attention that the base lacks are 1, and so is
    the ratio of layers for roles of the encoder, whose depth no rule covers.
    """
    first, second = asdict(base), asdict(target)
    if role is not None and role.is_vision:
        first["num_layers"] = second["num_layers"]
    absent = [name for name in _OF_PARTS if not first[name]]
    sizes = {name: second[name] or 1 for name in absent}
    first, second = {**first, **sizes}, {**second, **sizes}
    found = {name: second[name] / first[name] for name in first if first[name] and second[name]}
    if role is not None and role in SPANS:
        out, _ = SPANS[role]
        sides = [fan_in(role, scale) for scale in (first, second)]
        found["fan_in"] = sides[1] / sides[0]
        if out is not None:
            found["fan_out"] = second[out] / first[out]
            found["larger"] = max(second[out], sides[1]) / max(first[out], sides[0])
    return found


def check_registry(infos: Mapping[str, ParameterInfo], scale: Scale) -> None:
    """Raise `TypeError` if the shape of a matrix differs from `SPANS`, because rules would scale it by a wrong size."""
    sizes = asdict(scale)
    for info in infos.values():
        if info.role.initial_constant is not None:
            continue
        if info.role not in SPANS:
            raise TypeError(f"{info.name}: hparam.scale.SPANS lacks the role {info.role.name}")
        out, into = SPANS[info.role][0], fan_in(info.role, sizes)
        found = tuple(info.shape[-2:])
        expected = (*found[:-1], into) if out is None else (sizes[out], into)
        if found != expected:
            raise TypeError(f"{info.name} is {found}, but its role {info.role.name} requires {expected}")
