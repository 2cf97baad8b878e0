"""Run the same step for real, on gloo ranks: recorded as the dry run does, or measured by torch's profiler."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from core.config import load
from model.load_balance import Balancer
from parallel.comm.world import connect
from parallel.layout import Layout
from parallel.mesh import make_meshes
from parallel.parallelize import build
from train.config import TrainConfig, check, phases
from train.dryrun.step import StepRecord, record_step
from train.dryrun.walk import synthetic_batch
from train.engine.base import optimizer_step
from train.engine.fsdp import TorchEngine

CPU = torch.device("cpu")
MODEL = [
    *("model.hidden_size=64", "model.num_layers=2", "model.moe_every=2", "model.dense_hidden_size=128"),
    *("model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16", "model.expert_hidden_size=64"),
    *("model.vocab_size=1024", "model.router.force_balanced=true"),
    *("training.global_batch_size=4", "training.micro_batch_size=1", "training.seq_len=128"),
]


def small_run(*overrides: str, ranks: int = 1) -> tuple[TrainConfig, Layout]:
    """Return a run of a small model with balanced routing, and its layout."""
    config = load("train", TrainConfig, ["experiment=smoke", "hparam=none", *MODEL, *overrides])
    config = replace(config, data=replace(config.data, tokens=".", filter=None))
    return config, check(config, ranks)


def _engine(config: TrainConfig) -> TorchEngine:
    world = connect()
    meshes = make_meshes(check(config, world.size), world)
    return TorchEngine(build(config.model, config.precision, meshes, CPU, 0), config.optimizer)


def real_step(config: TrainConfig) -> StepRecord:
    """Train a step on this rank and record it."""
    phase, engine = phases(config)[0], _engine(config)
    batch = synthetic_batch(phase, engine.meshes)
    factor = phase.learning_rate_factor(0)
    return record_step(engine, batch, phase.micro_batch_size, config.training.clip_norm, factor)


def real_peak(config: TrainConfig) -> int:
    """Return the most bytes that a step allocates at once on this rank, from the profiler's log of the allocator."""
    phase, engine = phases(config)[0], _engine(config)
    engine.state()  # the optimizer's state
    balancer = Balancer(engine.placed.model)
    batch = synthetic_batch(phase, engine.meshes)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        optimizer_step(engine, balancer, batch, phase.micro_batch_size, config.training.clip_norm, 1.0)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
