"""From a network for one device to its place in a layout: the order of the techniques, on one screen."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.roles import ParameterInfo, registry
from model.transformer import Transformer
from parallel import fsdp, recompute, shards
from parallel.layout import ParallelConfig
from parallel.mesh import Meshes
from precision.backend import PrecisionConfig, resolve


def build(
    config: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    meshes: Meshes,
    device: torch.device,
    seed: int,
) -> tuple[Transformer, dict[str, ParameterInfo]]:
    """The model, laid out and initialised, and the registry of its parameters as the whole model knows them.

    Nothing is allocated before the layout is applied: each rank only ever holds its own part.
    """
    backend = resolve(precision)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(precision.master_dtype)
    try:
        with torch.device("meta"):
            model = Transformer(config, backend)
    finally:
        torch.set_default_dtype(previous)
    infos = registry(model)
    recompute.apply(model, parallel.recompute)
    fsdp.apply(model, meshes.data, precision)
    model.to_empty(device=device)
    shards.initialise(model, infos, config, seed)
    return model, infos
