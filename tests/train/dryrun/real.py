"""Run the same step for real, on gloo ranks, and record it as the dry run does."""

from __future__ import annotations

from dataclasses import replace

import torch

from core.config import load
from parallel.comm.world import connect
from parallel.layout import Layout
from parallel.mesh import make_meshes
from parallel.parallelize import build
from train.config import TrainConfig, check, phases
from train.dryrun.step import StepRecord, record_step
from train.dryrun.walk import synthetic_batch
from train.engine.fsdp import TorchEngine

CPU = torch.device("cpu")


def small_run(*overrides: str, ranks: int = 1) -> tuple[TrainConfig, Layout]:
    """Return a run of a small model with balanced routing, and its layout."""
    model = ["model.num_layers=4", "model.moe_every=2", "model.router.force_balanced=true"]
    config = load("train", TrainConfig, ["experiment=smoke", "hparam=none", *model, *overrides])
    config = replace(config, data=replace(config.data, tokens=".", filter=None))
    return config, check(config, ranks)


def real_step(config: TrainConfig) -> StepRecord:
    """Train a step on this rank."""
    world = connect()
    meshes = make_meshes(check(config, world.size), world)
    placed = build(config.model, config.precision, meshes, CPU, 0, config.training.frozen)
    phase = phases(config)[0]
    batch = synthetic_batch(phase, meshes)
    factor = phase.learning_rate_factor(0)
    engine = TorchEngine(placed, config.optimizer)
    return record_step(engine, batch, phase.micro_batch_size, config.training.clip_norm, factor)
