"""Scale a model along one axis of size, to make the families of models on which scaling rules are checked."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from core.errors import ConfigError
from model.config import ModelConfig


class SizeAxis(Enum):
    width = "width"
    """All hidden sizes and the numbers of heads; the size of a head stays the same."""
    depth = "depth"
    experts = "experts"
    """Total and active experts, so that sparsity stays the same."""
    batch = "batch"
    tokens = "tokens"


def grown(model: ModelConfig, axis: SizeAxis, factor: int) -> ModelConfig:
    """Return the model `factor` times as large along `axis`. Batch and tokens, sizes of the run, leave it as it is."""
    if axis is SizeAxis.width:
        keys = ["hidden_size", "num_heads", "num_kv_heads", "dense_hidden_size", "expert_hidden_size"]
        keys += [] if model.shared_expert_hidden_size is None else ["shared_expert_hidden_size"]
        latent = None if model.latent is None else model.latent.wider(factor)
        return replace(model, latent=latent, **{key: getattr(model, key) * factor for key in keys})
    if axis is SizeAxis.depth:
        if model.layer_list is not None:
            raise ConfigError("model.layer_list", None, "an explicit list of layers cannot be made deeper: remove it")
        return replace(model, num_layers=model.num_layers * factor)
    if axis is SizeAxis.experts:
        router = replace(model.router, top_k=model.router.top_k * factor)
        return replace(model, num_experts=model.num_experts * factor, router=router)
    return model
