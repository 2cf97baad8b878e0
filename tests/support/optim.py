"""A tiny model of every role, its optimizer in one process, and gradients."""

from __future__ import annotations

from typing import Any

import torch

from model.config import ModelConfig
from model.init import initialise
from model.roles import registry
from model.transformer import Transformer
from parallel.layout import ParallelConfig
from parallel.mesh import meshes_of_rank
from parallel.sharding import shard_specs
from precision.config import PrecisionConfig
from precision.resolve import resolve
from train.optim.optimizer import OptimizerConfig, make_optimizer

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MODEL = ModelConfig(**SIZES, dense_hidden_size=24, expert_hidden_size=8, num_experts=2)


def network(precision: PrecisionConfig | None = None) -> Transformer:
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
