"""From a network for one device to its place in a layout: the order of the techniques, on one screen."""

from __future__ import annotations

import torch
from torch import nn

from model.config import ModelConfig
from model.roles import registry
from model.transformer import Transformer
from parallel import compile, expert, fsdp, recompute, shards, tensor
from parallel.mesh import Meshes
from parallel.shards import ShardSpec
from precision.backend import PrecisionConfig, resolve


def build(
    config: ModelConfig, precision: PrecisionConfig, meshes: Meshes, device: torch.device, seed: int
) -> tuple[Transformer, dict[str, ShardSpec]]:
    """The model, laid out and initialised, and the place of each of its parameters.

    Nothing is allocated before the layout is applied: each rank only ever holds its own part.
    """
    model = on_meta(config, precision)
    specs = shards.shard_specs(registry(model), config, meshes)
    parallelize(model, specs, meshes, precision)
    model.to_empty(device=device)
    shards.initialise(model, specs, config, seed)
    return model, specs


def parallelize(model: Transformer, specs: dict[str, ShardSpec], meshes: Meshes, precision: PrecisionConfig) -> None:
    """Each technique wraps what the former left; data parallelism comes last."""
    _cut(model, specs)
    tensor.apply(model, meshes.tp)
    expert.apply(model, meshes)
    recompute.apply(model, meshes.layout.recompute)
    if meshes.layout.compile:
        compile.apply(model)
    fsdp.apply(model, specs, meshes, precision)


def on_meta(config: ModelConfig, precision: PrecisionConfig) -> Transformer:
    """The whole model without storage, in the master format."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(precision.master_dtype)
    try:
        with torch.device("meta"):
            return Transformer(config, resolve(precision))
    finally:
        torch.set_default_dtype(previous)


def _cut(model: Transformer, specs: dict[str, ShardSpec]) -> None:
    """Replace each parameter by one of the shape that this rank computes with."""
    for name, parameter in list(model.named_parameters()):
        if specs[name].splits:
            owner, _, attribute = name.rpartition(".")
            part = torch.empty(specs[name].computed.shape, dtype=parameter.dtype, device=parameter.device)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(part))
