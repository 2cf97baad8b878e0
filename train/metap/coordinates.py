"""Measure how much a few training steps change the activations on a fixed batch, for MetaP's coordinate check."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import Batch
from model.load_balance import Balancer
from model.moe import MixtureOfExperts
from model.transformer import Layer
from parallel.comm.world import World
from parallel.layout import ParallelConfig
from parallel.mesh import make_meshes
from parallel.parallelize import build
from train.config import TrainConfig, phases
from train.engine.base import optimizer_step
from train.engine.fsdp import TorchEngine
from train.engine.images import batch_images, load_tiles

QUANTITIES = ("embedding", "attention", "moe", "router", "residual", "logits")
"""The outputs of the embedding, of the last layer's attention and of the last MoE module; the logits of its router; the
residual stream before the final norm; and the model's logits.
"""


def changes(config: TrainConfig, batches: Sequence[Batch], probe: Batch) -> dict[str, dict[str, float]]:
    """Train one step on each of `batches` at the peak learning rate, in one process. Return, by quantity, its root
    mean square on `probe` before training (`initial`) and that of its change by training (`change`).
    """
    world = World(0, 1, torch.device("cpu"))
    meshes = make_meshes(ParallelConfig().resolve(1), world)
    frozen = config.training.frozen
    placed = build(config.model, config.precision, meshes, world.device, config.run.seed, frozen)
    engine = TorchEngine(placed, config.optimizer)
    balancer = Balancer(placed.model, partial(meshes.world.sum, purpose="balance"))
    phase = phases(config)[0]
    load_tiles(probe.images, meshes, len(probe.tokens_BT))
    before = _quantities(engine, probe)
    for batch in batches:
        load_tiles(batch.images, meshes, phase.micro_batch_size)
        optimizer_step(engine, balancer, batch, phase.micro_batch_size, config.training.clip_norm, 1.0)
    after = _quantities(engine, probe)
    return {name: {"initial": _rms(value), "change": _rms(after[name] - value)} for name, value in before.items()}


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
def _quantities(engine: TorchEngine, probe: Batch) -> dict[str, Tensor]:
    model = engine.placed.model
    layers = [layer for layer in model.layers.values() if isinstance(layer, Layer)]
    found: dict[str, Tensor] = {}
    watched: dict[str, nn.Module] = {"attention": layers[-1].attention, "residual": layers[-1]}
    if model.embedding is not None:
        watched["embedding"] = model.embedding
    moe = [layer.ffn for layer in layers if isinstance(layer.ffn, MixtureOfExperts)]
    if moe:
        watched["moe"] = moe[-1]
        watched["router"] = moe[-1].router.balance  # its output is the router's logits

    def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[name] = output.detach().clone()

    with ExitStack() as hooks:
        for name, module in watched.items():
            hooks.enter_context(module.register_forward_hook(partial(keep, name)))
        context = engine.placed.sequence_context(probe.positions_BT)
        context.images = next(iter(batch_images(engine.placed, probe.images, len(probe.tokens_BT))), None)
        found["logits"] = model(probe.tokens_BT, context).detach().clone()
    return {name: found[name] for name in QUANTITIES if name in found}
