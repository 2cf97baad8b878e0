"""A tiny run for tests: every kind of layer, packed documents and every balancing term.

`EXACT` selects float64 and plain SGD without clipping: AdamW hides the scale of gradients, and clipping their norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.config import load
from data.loader import Batch
from model.load_balance import Balancer
from parallel.comm.world import connect
from parallel.parallelize import ParallelModel
from parallel.sharding import ShardSpec, local
from train.certify.worker import BATCH_SIZE, SyntheticLoader
from train.config import TrainConfig
from train.corpus import get_corpus
from train.engine.base import StepResult, optimizer_step
from train.engine.fsdp import TorchEngine
from train.engine.images import load_tiles, local_sequences
from train.metrics import Log
from train.optim.config import OptimizerConfig
from train.run_directory import RunDirectory
from train.trainer import Trainer

TINY = [
    "hparam=none",
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.num_layers=4",
    "model.num_heads=4",
    "model.head_dim=8",
    "model.dense_hidden_size=48",
    "model.expert_hidden_size=32",
    "model.num_experts=4",
    "model.attention_chunk_size=16",
    "model.temperature_floor=16",
    "model.router.top_k=2",
    "model.balance.aux=0.01",
    "model.balance.z=0.001",
    "model.balance.bias_rate=0.01",
    "training.seq_len=48",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.steps=6",
    "schedule.warmup_steps=0",
    "schedule.kind=constant",
    "logging.every=1",
    "logging.report=false",
    "evaluation.every=0",
    "evaluation.sequences=4",
    "evaluation.baselines=false",
    "checkpoint.every=0",
]
EXACT = ["precision=fp64", "optimizer=sgd", "training.clip_norm=null"]


def config(root: Path, name: str, *overrides: str) -> TrainConfig:
    return load("train", TrainConfig, [*TINY, f"run.root={root}", f"run.name={name}", *overrides])


def trainer(root: Path, name: str, overrides: list[str]) -> Trainer:
    """Return this rank's trainer. It resumes from the run's newest checkpoint, if any."""
    run = config(root, name, *overrides)
    world = connect()
    directory = RunDirectory.of(run)
    world.from_main(lambda: (directory.check(run), directory.open(run)))
    log = Log(directory.path / "log.txt" if world.is_main else None)
    layout = run.parallel.resolve(world.size)
    return Trainer(run, layout, world, directory, get_corpus(run, world, lambda line: None), log)


def saved(root: Path, name: str, overrides: list[str], steps: int = 1) -> Trainer:
    """Train up to step `steps`, save a checkpoint and return the trainer."""
    run = trainer(root, name, overrides)
    for step in range(run.step, steps):
        run.train_step(step)
    run.save()
    run.checkpointer.wait()
    return run


def synthetic(
    placed: ParallelModel, optimizer: OptimizerConfig, micro_batch_size: int
) -> tuple[TorchEngine, Batch, Callable[[], StepResult]]:
    """Return an engine for a model, this rank's sequences of a synthetic batch, and a function that runs a step."""
    engine, meshes = TorchEngine(placed, optimizer), placed.meshes
    balancer = Balancer(placed.model, lambda counts: meshes.world.sum(counts, "balance"))
    share = BATCH_SIZE // meshes.dp.size
    vision = placed.model.config.vision
    loader = SyntheticLoader(placed.model.config.vocab_size, vision=vision)
    batch = local_sequences(partial(loader.batch, 0), meshes, share, micro_batch_size)
    load_tiles(batch.images, meshes, micro_batch_size)
    return engine, batch, partial(optimizer_step, engine, balancer, batch, micro_batch_size, None, 1.0)


def whole(tensor: torch.Tensor, spec: ShardSpec | None = None) -> torch.Tensor:
    """Return the whole tensor on every rank, from all ranks' blocks. Check that the blocks make up the tensor once."""
    part = local(tensor).detach()
    if spec is None or not dist.is_initialized():
        return part.clone()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (spec.local_block, spec.is_owner, part))
    result, filled = part.new_full(spec.info.shape, torch.nan), 0
    for block, is_owner, values in parts:
        place = tuple(slice(o, o + s) for o, s in zip(block.offset, block.shape, strict=True))
        assert is_owner or torch.equal(result[place], values) or torch.isnan(result[place]).all(), "replicas differ"
        result[place] = values
        filled += values.numel() if is_owner else 0
    assert filled == result.numel(), f"{spec.info.name}: the owners' blocks do not make up the tensor"
    return result


def figures(root: Path, name: str, overrides: list[str], steps: int = 2) -> dict[str, Any]:
    """Return losses, norms and balancing sums of `steps` steps, the first step's gradients and the final state."""
    run = trainer(root, name, overrides)
    found: dict[str, Any] = {"loss": [], "norm": [], "counts": [], "aux": [], "z": [], "entropy": []}
    gradients: dict[str, torch.Tensor] = {}
    clip = run.engine.clip

    def keep(limit: float | None) -> torch.Tensor:
        if not gradients:
            placed = run.engine.placed
            gradients.update({n: whole(p.grad, placed.specs[n]) for n, p in placed.model.named_parameters()})
        return clip(limit)

    run.engine.clip = keep  # type: ignore[method-assign]
    for step in range(steps):
        metrics = run.train_step(step)
        found["loss"].append(metrics.loss.item())
        found["norm"].append(metrics.gradient_norm.item())
        for key, value in metrics.balance.items():
            found[key].append(value)
    found["gradients"] = gradients
    state, specs = run.engine.placed.model.state_dict(), run.engine.placed.specs
    found["weights"] = {name: whole(tensor, specs.get(name)) for name, tensor in state.items()}
    return found
