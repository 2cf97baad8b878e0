"""A model and its run grown along one axis, all else in proportion: the families that rules are checked on."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from core.errors import ConfigError
from model.config import ModelConfig


class SizeAxis(Enum):
    width = "width"
    """Every width; more heads of the same width."""
    depth = "depth"
    experts = "experts"
    """At the same sparsity: as many times more per token."""
    batch = "batch"
    tokens = "tokens"


def grown(model: ModelConfig, axis: SizeAxis, factor: int) -> ModelConfig:
    """The model `factor` times as large along `axis`; itself along an axis of the run."""
    if axis is SizeAxis.width:
        keys = ["hidden_size", "num_heads", "num_kv_heads", "dense_hidden_size", "expert_hidden_size"]
        keys += [] if model.shared_expert_hidden_size is None else ["shared_expert_hidden_size"]
        return replace(model, **{key: getattr(model, key) * factor for key in keys})
    if axis is SizeAxis.depth:
        if model.layer_list is not None:
            raise ConfigError("model.layer_list", None, "a list of layers cannot be made deeper: leave it out")
        return replace(model, num_layers=model.num_layers * factor)
    if axis is SizeAxis.experts:
        router = replace(model.router, top_k=model.router.top_k * factor)
        return replace(model, num_experts=model.num_experts * factor, router=router)
    return model
