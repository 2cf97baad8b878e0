"""Build small models for tests, in one process or on many ranks, and an optimizer."""

from __future__ import annotations

from typing import Any

import torch

from model.config import ModelConfig
from model.init import initialise
from model.roles import registry
from model.transformer import Transformer
from parallel import parallelize
from parallel.comm.world import connect
from parallel.layout import ParallelConfig
from parallel.mesh import Meshes, make_meshes, meshes_of_rank
from parallel.sharding import shard_specs
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve
from train.optim.config import OptimizerConfig
from train.optim.optimizer import make_optimizer


def small(**changes: Any) -> ModelConfig:
    """Return a model of four layers: every second one is an MoE layer, and the last has no rotary positions."""
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "attention_chunk_size": 16}
    layers = {"dense_hidden_size": 48, "expert_hidden_size": 32, "num_experts": 4, "moe_every": 2}
    return ModelConfig(**{"vocab_size": 64, "hidden_size": 32, "num_layers": 4, **attention, **layers, **changes})


def build(config: ModelConfig, seed: int = 0, compute: Compute = Compute.float64) -> Transformer:
    model = Transformer(config, resolve(PrecisionConfig(compute)))
    if compute is Compute.float64:
        model.double()
    initialise(model, config, seed)
    return model


def meshes_here(parallel: ParallelConfig) -> Meshes:
    """Return this rank's meshes in a layout of all ranks that call this."""
    world = connect()
    return make_meshes(parallel.resolve(world.size), world)


def placed_here(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, seed: int = 1
) -> parallelize.ParallelModel:
    return parallelize.build(model, precision, meshes_here(parallel), connect().device, seed)


SIZES = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MODEL = ModelConfig(**SIZES, dense_hidden_size=24, expert_hidden_size=8, num_experts=2)


def network(precision: PrecisionConfig | None = None) -> Transformer:
    """Return a tiny model with parameters of every role."""
    precision = precision or PrecisionConfig()
    made = Transformer(MODEL, resolve(precision)).to(precision.master_dtype)
    initialise(made, MODEL, seed=0)
    return made


def optimizer_of(model: Transformer, config: OptimizerConfig) -> Any:
    meshes = meshes_of_rank(ParallelConfig().resolve(1), 0)
    return make_optimizer(model, shard_specs(registry(model), MODEL, meshes), config, meshes)


def give_gradients(model: Transformer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
