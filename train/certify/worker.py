"""What a model computes under one layout, to be held against what one process computes: a rank's part of `certify`.

Rows are made up: random tokens in packed documents, a pure function of the step, so that no corpus is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.loader import IGNORED, Batch
from model.balancer import Balancer
from model.config import ModelConfig
from model.load_balance import RouterBalance
from parallel.comm.world import World, connect
from parallel.layout import Layout, ParallelConfig
from parallel.mesh import Meshes, make_meshes
from parallel.parallelize import build
from parallel.sharding import LocalShard, ShardBlock
from precision.config import PrecisionConfig
from train.checkpoint.manager import Checkpointer
from train.engine.base import optimizer_step
from train.engine.deepspeed import make_engine
from train.engine.fsdp import Engine
from train.eval.held_out import held_out_loss
from train.optim.optimizer import OptimizerConfig

CONTEXT, ROWS, SEED = 64, 8, 11
_SOURCE, _HELD_OUT = "made up", 5


@dataclass(frozen=True)
class CertifyCase:
    """A short run. `labels=False`: the language-model loss is left out, so that what remains are the balancing terms.
    `starve`: half of the experts get no tokens. `resume`: a directory to go on from, `save`: where to save before the
    last step. `imitates`: micro-batches are made of one row of each of so many data-parallel ranks, by one process too.
    """

    model: ModelConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig
    clip_norm: float | None = None
    steps: int = 1
    labels: bool = True
    starve: bool = False
    resume: Path | None = None
    save: Path | None = None
    context: int = CONTEXT
    rows: int = ROWS
    imitates: int | None = None


class Ranks(Protocol):
    """Runs a function on so many ranks and returns what each returned; raises `RankFailure` where one raises."""

    def __call__(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]: ...


def micro_batch_size(layout: Layout) -> int:
    """Rows per micro-batch; a pipeline wants many."""
    return 1 if layout.pp > 1 else 2


Blocks = dict[str, list[tuple[ShardBlock, Tensor]]]
"""A rank's blocks of tensors, by parameter."""


@dataclass
class RankResults:
    """By step: loss, gradient norm, tokens per expert, balancing terms. Then this rank's blocks of the first step's
    gradients and of the last weights, the routers' state, and the held-out loss.
    """

    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    aux: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    gradients: Blocks = field(default_factory=dict)
    weights: Blocks = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)
    held_out: float = 0.0


class MadeUpRows:
    """Rows of random tokens, as the loader would give them."""

    def __init__(self, vocab_size: int, seq_len: int = CONTEXT, order: Sequence[int] = range(ROWS)) -> None:
        self.vocab_size, self.seq_len, self.order = vocab_size, seq_len, np.array(order)

    def batch(self, step: int, start: int, stop: int) -> Batch:
        generator = np.random.default_rng([SEED, step])
        shape = (len(self.order), self.seq_len + 1)
        tokens = np.minimum(generator.zipf(1.3, shape), self.vocab_size) - 1
        begins = generator.random(shape) < 1 / 12  # a document every dozen tokens, some longer than a chunk
        places = np.arange(self.seq_len + 1)
        last = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        labels = np.where(begins[:, 1:], IGNORED, tokens[:, 1:])
        columns = (tokens[:, :-1], labels, (places - last)[:, :-1])
        rows = [torch.from_numpy(np.ascontiguousarray(column[self.order[start:stop]])) for column in columns]
        return Batch(rows[0], rows[1], rows[2], torch.zeros(stop - start, dtype=torch.int64))

    def num_held_out(self, source: str) -> int:
        return min(_HELD_OUT, len(self.order))

    def held_out(self, source: str, start: int, stop: int) -> Batch:
        unordered = MadeUpRows(self.vocab_size, self.seq_len, range(len(self.order)))
        return unordered.batch(1 << 20, start, stop)


class RecordingEngine:
    """What `optimizer_step` asks of an engine; the gradients of the first step are kept as they are before clipping."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.first: Blocks = {}
        self.forward_backward, self.step = engine.forward_backward, engine.step

    def clip(self, limit: float | None) -> Tensor:
        norm = self.engine.clip(None)
        if not self.first:
            self.first = kept(self.engine.gradients())
        return self.engine.clip(limit) if limit is not None else norm


def kept(blocks: Iterable[LocalShard]) -> Blocks:
    """Copies of a rank's blocks, by parameter."""
    found: Blocks = {}
    for one in blocks:
        if one.values.numel():
            found.setdefault(one.spec.info.name, []).append((one.block, one.values.detach().clone()))
    return found


def measure(case: CertifyCase, world: World, meshes: Meshes) -> RankResults:
    """Run `case` on this rank."""
    placed = build(case.model, case.precision, meshes, world.device, SEED)
    model, inner = placed.model, make_engine(placed, case.optimizer, SEED)
    engine, found = RecordingEngine(inner), RankResults()
    balancer = Balancer(model, lambda counts: meshes.world.sum(counts, "balance"))
    rows, begin, share = _rows(case, meshes), 0, case.rows // meshes.rows.size
    size = case.imitates // meshes.rows.size if case.imitates else micro_batch_size(meshes.layout)
    if case.starve:
        _starve(model)
    if case.resume is not None:
        progress = Checkpointer(case.resume, world, 1, False, _refuse).restore(inner.state())
        assert progress is not None, f"no checkpoint in {case.resume}"
        inner.written()
        begin = progress["step"]
    for step in range(begin, case.steps):
        if case.save is not None and step == case.steps - 1:
            Checkpointer(case.save, world, 1, False, _refuse).save(step, inner.state(), {})
        batch = rows.batch(step, meshes.rows.rank * share, (meshes.rows.rank + 1) * share)
        if not case.labels:
            batch.labels_BT.fill_(IGNORED)
        result = optimizer_step(engine, balancer, batch, size, case.clip_norm, 1.0)
        found.loss.append(result.loss.item())
        found.norm.append(result.gradient_norm.item())
        for key, value in result.balance.items():
            getattr(found, key).append(value.cpu())
    found.gradients = engine.first
    found.weights = kept(inner.weights())
    found.routers = {name: buffer.clone().cpu() for name, buffer in model.named_buffers() if "balance" in name}
    bytes_V = torch.ones(case.model.vocab_size, dtype=torch.int64)
    found.held_out = held_out_loss(placed, rows, bytes_V, rows.num_held_out(_SOURCE), 2, {_SOURCE: 1.0}).loss
    return found


def _rows(case: CertifyCase, meshes: Meshes) -> MadeUpRows:
    order = np.arange(case.rows)
    if case.imitates and meshes.rows.size == 1:
        order = order.reshape(case.imitates, -1).T.flatten()  # the first rows of all ranks, the second ones, ...
    return MadeUpRows(case.model.vocab_size, case.context, order.tolist())


def measure_all(parallel: ParallelConfig, cases: Mapping[str, CertifyCase]) -> dict[str, RankResults]:
    """Run all `cases` on this rank of the present world, folded as `parallel` says."""
    world = connect()
    meshes = make_meshes(parallel.resolve(world.size), world)
    return {name: measure(case, world, meshes) for name, case in cases.items()}


def _starve(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, RouterBalance):
            module.bias_E[: len(module.bias_E) // 2] = -1e9


def _refuse(line: str) -> None:
    raise RuntimeError(line)
