"""Distribute contrastive towers over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.roles import ParameterInfo, Role, registry
from model.vision.towers import ContrastiveTowers
from parallel import activation_checkpoint, fsdp, sharding
from parallel.mesh import Meshes
from parallel.parallelize import ParallelNetwork, freeze, on_meta_device
from precision.config import PrecisionConfig
from precision.resolve import Precision, resolve


@dataclass(frozen=True)
class TowersConfig:
    """Contrastive towers: the sizes of their encoder and decoder, the size of a feature, and initial values of the
    parameters that turn cosines into logits. Without a `bias` they have none.
    """

    model: ModelConfig
    feature_size: int
    log_scale: float
    bias: float | None = None

    def build(self, precision: Precision) -> ContrastiveTowers:
        return ContrastiveTowers(self.model, self.feature_size, precision, self.log_scale, self.bias)

    def infos(self) -> dict[str, ParameterInfo]:
        """Return every parameter by name, without allocating memory for it."""
        with on_meta_device(PrecisionConfig()):
            return registry(self.build(Precision(PrecisionConfig())))


@dataclass(frozen=True)
class ParallelTowers(ParallelNetwork):
    """The part of contrastive towers that this rank holds."""

    model: ContrastiveTowers

    def release(self) -> None:
        """Free the parameters that a forward pass without a backward pass leaves gathered."""
        fsdp.reshard(self.model)


def build_towers(
    config: TowersConfig,
    precision: PrecisionConfig,
    meshes: Meshes,
    device: torch.device,
    seed: int,
    frozen: AbstractSet[Role] = frozenset(),
) -> ParallelTowers:
    """Build, distribute and initialise towers, like `parallelize.build`. FSDP2 shards each layer of both towers, then
    the rest of each. `log_scale` and `bias` stay whole: the loss reads them outside the forward pass of a tower.
    """
    with on_meta_device(precision):
        model = config.build(resolve(precision, device))
    freeze(model, frozen)
    specs = sharding.shard_specs(registry(model), config.model, meshes)
    activation_checkpoint.apply(model, meshes.layout.recompute)
    fsdp.apply(model, {0: model.text}, specs, meshes, precision)
    model.to_empty(device=device)
    fsdp.count_traffic([model.text, model.vision], meshes)
    sharding.initialise(sharding.local_shards(model, specs), config.model, seed)
    return ParallelTowers(model, specs, meshes)
