"""How large a model and its run are: what scaling rules take ratios of, and which of it each role's matrix spans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from core.errors import ConfigError
from model.config import FeedForward, ModelConfig
from model.roles import ParameterInfo, Role


@dataclass(frozen=True)
class Scale:
    """Sizes of a whole model, whatever part of it a rank holds. Widths in elements, `batch` and `tokens` in tokens (one
    optimizer step; the whole run). A mixture's sizes are 0 where there is none.
    """

    width: int
    layers: int
    head_width: int
    query_width: int
    """Of all query heads together."""
    value_width: int
    """Of all key, or all value heads together."""
    dense_width: int
    shared_width: int
    expert_width: int
    experts: int
    top_k: int
    batch: int
    tokens: int

    def __post_init__(self) -> None:
        for one in fields(self):
            least = 0 if one.name in ("dense_width", "shared_width", "expert_width", "experts", "top_k") else 1
            if getattr(self, one.name) < least:
                raise ConfigError(one.name, getattr(self, one.name), f"must be at least {least}")

    @property
    def steps(self) -> float:
        return self.tokens / self.batch


def scale_of(model: ModelConfig, batch: int, tokens: int) -> Scale:
    """`batch` and `tokens` in tokens."""
    dense = any(layer.feed_forward is FeedForward.dense for layer in model.blocks)
    mixture = model.has_experts
    return Scale(
        width=model.width,
        layers=model.layers,
        head_width=model.head_width,
        query_width=model.heads * model.head_width,
        value_width=model.kv_heads * model.head_width,
        dense_width=model.dense_width if dense else 0,
        shared_width=model.shared_expert_width if mixture else 0,
        expert_width=model.expert_width if mixture else 0,
        experts=model.experts if mixture else 0,
        top_k=model.router.top_k if mixture else 0,
        batch=batch,
        tokens=tokens,
    )


def kind_of(model: ModelConfig) -> dict[str, str]:
    """What of a model is no size: no rule leads from one kind to another."""
    found = {
        "norms": "+".join(sorted({layer.qk_norm.value for layer in model.blocks})),
        "tied": str(model.tie_embeddings).lower(),
    }
    if model.has_experts:
        router = model.router
        found |= {"score": router.score.value, "renormalise": str(router.renormalise).lower()}
        found["weights_on"] = router.weights_on.value
    return found


SPANS: Mapping[Role, tuple[str | None, str]] = {
    Role.embedding: (None, "width"),
    Role.head: (None, "width"),
    Role.query: ("query_width", "width"),
    Role.key: ("value_width", "width"),
    Role.value: ("value_width", "width"),
    Role.attention_output: ("width", "query_width"),
    Role.dense_gate: ("dense_width", "width"),
    Role.dense_up: ("dense_width", "width"),
    Role.dense_down: ("width", "dense_width"),
    Role.shared_gate: ("shared_width", "width"),
    Role.shared_up: ("shared_width", "width"),
    Role.shared_down: ("width", "shared_width"),
    Role.expert_gate_up: ("expert_width", "width"),
    Role.expert_down: ("width", "expert_width"),
    Role.router: ("experts", "width"),
}
"""What a role's matrix maps to (fan out; None: the vocabulary, which is not scaled) and from (fan in)."""


def ratios(base: Scale, target: Scale, role: Role | None = None) -> dict[str, float]:
    """Target over base of every size that both have; with a role also of its matrix: `fan_in`, `fan_out` and the
    `larger` of the two.
    """
    first, second = asdict(base), asdict(target)
    found = {name: second[name] / first[name] for name in first if first[name] and second[name]}
    if role is not None and role in SPANS:
        out, into = SPANS[role]
        sides = [scale[into] for scale in (first, second)]
        found["fan_in"] = sides[1] / sides[0]
        if out is not None:
            found["fan_out"] = second[out] / first[out]
            found["larger"] = max(second[out], sides[1]) / max(first[out], sides[0])
    return found


def check_registry(infos: Mapping[str, ParameterInfo], scale: Scale) -> None:
    """Raise `TypeError` where a matrix is not what `SPANS` says of its role: a rule would scale it by a wrong size."""
    sizes = asdict(scale)
    for info in infos.values():
        if info.role.is_norm:
            continue
        if info.role not in SPANS:
            raise TypeError(f"{info.name}: hparam.scale.SPANS says nothing about the role {info.role.name}")
        out, into = SPANS[info.role]
        expected = (info.shape[-2] if out is None else sizes[out], sizes[into])
        if tuple(info.shape[-2:]) != expected:
            raise TypeError(
                f"{info.name} is {tuple(info.shape[-2:])}, not {expected} as its role {info.role.name} says"
            )
