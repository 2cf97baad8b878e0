"""Run the real model, layout, optimizer and step as one rank of a world of any size, on one CPU.

The process group is torch's fake one, which sends nothing, and tensors are on the meta device, with the kernels that
are chosen on a GPU. Values are not computed, so that routing must be assumed: each expert gets equally many tokens,
except that those of this rank may get `imbalance` times as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.errors import ConfigError, LeviathanError, one_line
from data.images.batch import BatchImages, TileRef
from data.loader import IGNORED, Batch
from model.config import ModelConfig
from model.moe import Router
from parallel.checks.meta import META, MetaDevice, meta_device
from parallel.comm.groups import ProcessGroups
from parallel.comm.world import World
from parallel.layout import EngineKind, Layout
from parallel.mesh import MeshAxis, Meshes, make_meshes
from parallel.parallelize import build
from train.config import Phase, TrainConfig, check_language, phases
from train.dryrun.step import StepRecord, record_step
from train.engine.base import LanguageEngine
from train.engine.fsdp import TorchEngine
from train.engine.images import load_tiles, local_sequences

GPU = torch.device("cuda")


@dataclass(frozen=True)
class Assumptions:
    """What a walk assumes of the data. `imbalance`: tokens of this rank's experts, relative to the mean. `tiles`: the
    image tiles of each sequence. Each sequence is one document.
    """

    imbalance: float = 1.0
    tiles: int = 0


@dataclass(frozen=True)
class RankWalk:
    """The record of one rank's step, with the rank's place in the layout. `axes`: names of process groups' axes."""

    rank: int
    place: dict[str, int]
    axes: dict[str, str]
    step: StepRecord


def check_walk(config: TrainConfig, layout: Layout, given: Assumptions) -> None:
    """Raise `ConfigError` for what a dry run cannot walk."""
    check_language(config, "training.objective", config.training.objective.name)
    if layout.engine is not EngineKind.fsdp2:
        reason = "the dry run walks FSDP2 only"
        raise ConfigError("parallel.engine", layout.engine, reason, [EngineKind.fsdp2.value])
    if config.precision.uses_float8:
        reason = "the dry run has no FP8 arithmetic: add precision=bf16"
        raise ConfigError("precision.compute", config.precision.compute, reason, ["bfloat16"])
    top_k = config.model.router.top_k if config.model.has_experts else 1
    most = min(layout.ep, config.model.num_experts / top_k)
    if given.imbalance > most:
        reason = f"the experts of one of parallel.ep={layout.ep} groups get at most {most:g} times the mean"
        raise ConfigError("imbalance", given.imbalance, reason, [f"{most:g}"])
    for phase in phases(config) if given.tiles else ():
        if config.model.vision is None:
            raise ConfigError("tiles", given.tiles, "the model has no vision encoder", [0])
        if (need := given.tiles * config.model.vision.tokens_per_tile) > phase.seq_len:
            reason = f"take {need} tokens of a sequence of {phase.seq_len}"
            most_tiles = phase.seq_len // config.model.vision.tokens_per_tile
            raise ConfigError("tiles", given.tiles, reason, [most_tiles])


def walk(
    config: TrainConfig, layout: Layout, rank: int, given: Assumptions | None = None, kind: torch.device = GPU
) -> RankWalk:
    """Run a step of the first phase as `rank`. `kind`: the device whose kernels are chosen.

    Raises `LeviathanError` with what went wrong on this rank. Compiled layers run as they are without the compiler.
    """
    given = given or Assumptions()
    layout, phase = replace(layout, compile=False), phases(config)[0]
    with _playing(rank, layout.world_size) as world, meta_device(kind.type) as device:
        try:
            meshes = make_meshes(layout, world)
            engine = _engine(config, meshes, device, given.imbalance, kind)
            batch = synthetic_batch(phase, meshes, given.tiles)
            size, clip = phase.micro_batch_size, config.training.clip_norm
            step = record_step(engine, batch, size, clip, phase.learning_rate_factor(0), device.read)
        except Exception as error:
            raise _on_rank(rank, error) from error
        return RankWalk(rank, _place(meshes), _axes(meshes), step)


@contextmanager
def _playing(rank: int, world_size: int) -> Iterator[World]:
    """Join a world of this size as one of its ranks, on a process group that sends nothing."""
    if world_size == 1:
        yield World(0, 1, META)
        return
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield World(rank, world_size, META, groups=ProcessGroups())
    finally:
        dist.destroy_process_group()


def _engine(
    config: TrainConfig, meshes: Meshes, device: MetaDevice, imbalance: float, kind: torch.device
) -> LanguageEngine:
    placed = build(config.model, config.precision, meshes, META, config.run.seed, config.training.frozen, kind)
    held = config.model.num_experts // meshes.ep.size
    hot = range(meshes.ep.rank * held, (meshes.ep.rank + 1) * held)

    def select(honest: Any, logits_BTE: Tensor) -> Tensor:
        experts_BTK = honest(logits_BTE)
        device.write(experts_BTK, assumed_routing(experts_BTK.shape, config.model, hot, imbalance))
        return experts_BTK

    for router in placed.model.modules():
        if isinstance(router, Router):
            vars(router)["_select"] = partial(select, router._select)
    return TorchEngine(placed, config.optimizer)


def assumed_routing(shape: torch.Size, model: ModelConfig, hot: range, imbalance: float) -> Tensor:
    """Return expert ids, int64 [B, T, K], on the host. Experts in `hot` get `imbalance` times the mean number of
    tokens, the others an equal share of the rest. A token's experts differ. Balanced ids are those of
    `RouterConfig.force_balanced`.
    """
    slots, experts = shape.numel(), model.num_experts
    if imbalance == 1:
        return (torch.arange(slots) % experts).view(shape)
    shares = np.full(experts, (1 - imbalance * len(hot) / experts) / max(1, experts - len(hot)))
    shares[hot.start : hot.stop] = imbalance / experts
    bounds = np.rint(np.concatenate([[0.0], shares.cumsum()]) * slots).astype(np.int64)
    sorted_S = torch.arange(experts).repeat_interleave(torch.from_numpy(np.diff(bounds)))
    return sorted_S.view(shape[-1], -1).t().reshape(shape)  # slots of a token are far apart in the sorted ids


def synthetic_batch(phase: Phase, meshes: Meshes, tiles: int = 0) -> Batch:
    """Return this rank's sequences of a global batch, one document each, which begins with `tiles` image tiles. If the
    model has a vision encoder, the batch has `images`.
    """
    vision, length = phase.model.vision, phase.seq_len
    positions_T = torch.arange(length)

    def take(start: int, stop: int) -> Batch:
        shape = (stop - start, length)
        tokens_BT, labels_BT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        images = None
        if vision is not None:
            rows_T = torch.where(positions_T < tiles * vision.tokens_per_tile, positions_T, -1)
            rows_BT = rows_T.repeat(shape[0], 1)
            tokens_BT[rows_BT >= 0] = vision.image_token_id
            labels_BT[rows_BT >= 0] = IGNORED
            shown = [[TileRef("dry", number, tile) for tile in range(tiles)] for number in range(start, stop)]
            side = vision.tile_size
            images = BatchImages(rows_BT, shown, vision.tokens_per_tile, partial(_grey_tile, side), side)
        return Batch(tokens_BT, labels_BT, positions_T.repeat(shape[0], 1), torch.zeros(shape[0]).long(), images)

    count = phase.global_batch_size // meshes.dp.size
    batch = local_sequences(take, meshes, count, phase.micro_batch_size)
    load_tiles(batch.images, meshes, phase.micro_batch_size)
    return batch


def _grey_tile(side: int, tile: TileRef) -> NDArray[np.uint8]:
    return np.zeros((3, side, side), np.uint8)


def _place(meshes: Meshes) -> dict[str, int]:
    axes = [axis for axis in vars(meshes).values() if isinstance(axis, MeshAxis) and axis.size > 1]
    return {axis.name: axis.rank for axis in axes if axis.name not in ("world", "ends")}


def _axes(meshes: Meshes) -> dict[str, str]:
    """Return the axes of each process group by its name. Equal groups of several axes are one."""
    found: dict[str, list[str]] = {}
    for axis in meshes.joined:
        group = axis.group or dist.group.WORLD
        assert group is not None
        found.setdefault(group.group_name, []).append(axis.name)
    return {name: "/".join(axes) for name, axes in found.items()}


def _on_rank(rank: int, error: Exception) -> LeviathanError:
    """Return the error that a user reads. torch's pipeline wraps what a stage raises."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, LeviathanError):
        cause = cause.__cause__
    return cause if isinstance(cause, LeviathanError) else LeviathanError(f"rank {rank}: {one_line(cause)}")
