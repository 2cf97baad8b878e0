"""Held-out loss per source, in nats per token and bits per byte; the verb `evaluate` does it for a finished run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core.errors import ConfigError, DataError, check_numbers
from data.loader import Batch
from parallel.comm.world import World, connect
from parallel.fsdp import release
from parallel.mesh import MeshAxis
from parallel.parallelize import ParallelModel
from precision.config import Backend
from train.loss import IGNORED, token_losses


@dataclass(frozen=True)
class SourceLoss:
    """`loss` in nats per token over `tokens` labelled tokens; `bits_per_byte` of the text that those tokens spell."""

    loss: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class HeldOut:
    """Losses per source and their mean weighted by the sources' shares in `data.sources`: a phase's own shares do not
    count, so that the figures of a run can be compared.
    """

    loss: float
    bits_per_byte: float
    sources: dict[str, SourceLoss]

    def plain(self) -> dict[str, object]:
        return {
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "sources": {k: vars(v) for k, v in self.sources.items()},
        }


class HeldOutRows(Protocol):
    """What evaluation asks of a loader."""

    seq_len: int

    def num_held_out(self, source: str) -> int: ...

    def held_out(self, source: str, start: int, stop: int) -> Batch: ...


@torch.no_grad()
def held_out_loss(
    placed: ParallelModel,
    loader: HeldOutRows,
    bytes_V: Tensor,
    rows: int,
    micro_batch_size: int,
    weights: dict[str, float],
) -> HeldOut:
    """The first `rows` rows of each source's held-out split, spread over the ranks in micro-batches of equal number.

    `bytes_V`: how many bytes of text each token id spells.
    Sources without a held-out row at this context are left out; raises `DataError` where that leaves none.
    """
    weights = {source: weight for source, weight in weights.items() if loader.num_held_out(source)}
    if not weights:
        raise DataError(f"no source has held-out text for one row of {loader.seq_len} tokens: raise data.held_out")
    model, meshes, device = placed.model, placed.meshes, placed.device
    bytes_V = bytes_V.to(device)
    model.eval()
    found: dict[str, SourceLoss] = {}
    for source in weights:
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
        for batch in _share(loader, source, rows, micro_batch_size, meshes.rows):
            sums += _sums(placed, batch, bytes_V)
        meshes.world.sum(sums, "evaluation")
        nats, tokens, size = sums.tolist()
        found[source] = SourceLoss(nats / max(tokens, 1), nats / max(size, 1) / math.log(2), int(tokens))
    model.train()
    release(placed.stacks)
    total = sum(weights.values())
    mean = sum(weights[s] * found[s].loss for s in weights) / total
    bits = sum(weights[s] * found[s].bits_per_byte for s in weights) / total
    return HeldOut(mean, bits, found)


def held_out_batches(loader: HeldOutRows, source: str, rows: int, micro_batch_size: int) -> Iterator[Batch]:
    """The first `rows` held-out rows of a source, or as many as there are."""
    available = min(rows, loader.num_held_out(source))
    for start in range(0, available, micro_batch_size):
        yield loader.held_out(source, start, min(start + micro_batch_size, available))


def _share(loader: HeldOutRows, source: str, rows: int, micro_batch_size: int, axis: MeshAxis) -> Iterator[Batch]:
    """This rank's micro-batches. Every rank runs the model equally often and on equally many rows (a sharded model
    gathers together): what its share lacks a rank fills up with a row whose labels are all ignored.
    """
    batches = list(held_out_batches(loader, source, rows, micro_batch_size))
    for turn in range(0, len(batches), axis.size):
        mine = batches[turn + axis.rank] if turn + axis.rank < len(batches) else None
        yield mine if axis.size == 1 and mine is not None else filled(mine, batches[0])


def filled(batch: Batch | None, full: Batch) -> Batch:
    """`batch` with as many rows as `full`, the added ones without labels."""
    count = 0 if batch is None else len(batch.tokens_BT)
    spare = full.slice(count, len(full.tokens_BT))
    spare.labels_BT = torch.full_like(spare.labels_BT, IGNORED)
    return spare if batch is None else batch.concat(spare)


def _sums(placed: ParallelModel, batch: Batch, bytes_V: Tensor) -> Tensor:
    """Nats, tokens and bytes of what this rank has of a batch; zeros where another rank counts it."""
    meshes, share = placed.meshes, placed.share(batch.tokens_BT.shape[1])
    context = placed.context(batch.positions_BT)
    logits_BTV = placed.logits(share.take(batch.tokens_BT).to(placed.device), context)
    if logits_BTV is None:
        return torch.zeros(3, dtype=torch.float64, device=placed.device)
    labels_BT = share.take(batch.labels_BT).to(placed.device)
    losses_BT = token_losses(logits_BTV, labels_BT, meshes.tp)
    counted = labels_BT != IGNORED
    size = bytes_V[labels_BT.clamp_min(0)] * counted
    sums = torch.stack([losses_BT.sum(dtype=torch.float64), counted.sum().double(), size.sum().double()])
    return sums * (meshes.tp.rank == 0)


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out loss of a run's last checkpoint, or tasks of the evaluation harness (lm-eval). `run`: the run's
    directory; for tasks it may also be an imported model or one in the Hugging Face format.
    """

    run: str = "???"
    sequences: int | None = None
    """Held-out rows per source; null: as many as in the run."""
    micro_batch_size: int | None = None
    """Rows at a time; null: as in the run, which then gives the run's own figure to the last bit."""
    backend: Backend | None = None
    """Who does the matrix products; null: as in training. For runs; any other model is evaluated in float32."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks; empty: the held-out loss."""
    task_path: str | None = None
    """Directory with task files (YAML) of your own."""
    limit: int | None = None
    """Examples per task; null: all."""
    few_shot: int | None = None
    """Solved examples before each question; null: as the task says."""
    out: str | None = None
    """JSON file for the tasks' figures and samples."""

    def __post_init__(self) -> None:
        for key in ("sequences", "micro_batch_size", "limit"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(key, value, "must be positive")
        check_numbers(self, not_negative=("few_shot",))
        if self.tasks and self.sequences is not None:
            raise ConfigError(
                "sequences", self.sequences, "counts held-out rows, which tasks do not read; leave it out"
            )
        for key in ("task_path", "limit", "few_shot", "out"):
            value = getattr(self, key)
            if value is not None and not self.tasks:
                raise ConfigError(key, value, "is for tasks, and none is named; name some in tasks")


def run(config: EvaluateConfig) -> int:
    """Print the held-out loss of a run's last whole checkpoint as JSON."""
    from train.checkpoint.restore import restore

    world = connect()
    try:
        if config.tasks:
            return _run_tasks(config, world)
        restored = restore(Path(config.run), world, config.backend)
        loader = restored.loader()
        rows = config.sequences or restored.config.evaluation.sequences
        micro_batch_size = config.micro_batch_size or restored.phase.micro_batch_size
        weights = restored.weights()
        bytes_V = torch.from_numpy(restored.corpus.tokenizer.token_bytes())
        result = held_out_loss(restored.placed, loader, bytes_V, rows, micro_batch_size, weights)
        if world.is_main:
            print(json.dumps({"step": restored.step, **result.plain()}, indent=2))
        return 0
    finally:
        world.close()


def _run_tasks(config: EvaluateConfig, world: World) -> int:
    try:
        from train.eval.lm_eval import run_tasks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ConfigError("tasks", None, "need the evaluation harness: pip install 'leviathan[eval]'") from None
    return run_tasks(config, world)
