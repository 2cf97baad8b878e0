"""Run short cases of `certify` on one rank under one layout, and record the results.

Batches are synthetic, so that no corpus is needed. Their packed documents of random tokens depend only on the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.images.batch import BatchImages, TileRef
from data.loader import IGNORED, Batch
from model.config import ModelConfig
from model.load_balance import Balancer, RouterBalance
from model.roles import Role
from model.vision.config import VisionConfig
from parallel.comm.world import World, connect
from parallel.layout import Layout, ParallelConfig
from parallel.mesh import Meshes, make_meshes
from parallel.parallelize import build
from parallel.sharding import LocalShard, ShardBlock
from precision.config import PrecisionConfig
from train.checkpoint.manager import Checkpointer
from train.engine import make_engine
from train.engine.base import optimizer_step
from train.engine.images import load_tiles, local_sequences
from train.eval.held_out import held_out_loss
from train.optim.config import OptimizerConfig

SEQ_LEN, BATCH_SIZE, SEED = 64, 8, 11
_SOURCE, _HELD_OUT = "synthetic", 5


@dataclass(frozen=True)
class CertifyCase:
    """A short run. `labels=False` drops the language-model loss, so that only the balancing terms remain. `starve`:
    half of the experts get no tokens. `resume`: directory to resume from. `save`: directory for a checkpoint before the
    last step. `emulates`: a number of data-parallel ranks. In one process each micro-batch then has one sequence of
    each of these ranks.
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
    seq_len: int = SEQ_LEN
    batch_size: int = BATCH_SIZE
    emulates: int | None = None
    frozen: frozenset[Role] = frozenset()


class RunOnRanks(Protocol):
    """Call a function on `ranks` ranks and return what each returned. Raises `RankFailure` if one of them raises."""

    def __call__(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]: ...


def micro_batch_size(layout: Layout) -> int:
    """Return the sequences per micro-batch; a pipeline needs many micro-batches, and the others need several."""
    return 1 if layout.pp > 1 or layout.dp >= BATCH_SIZE // 2 else 2


Blocks = dict[str, list[tuple[ShardBlock, Tensor]]]
"""A rank's blocks of tensors, by parameter."""


@dataclass
class RankResults:
    """The results of a case on one rank. For each step: loss, gradient norm and the balancer's statistics. Once: this
    rank's blocks of the first step's gradients and of the final weights, the routers' state and the held-out loss.
    """

    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    balance: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    gradients: Blocks = field(default_factory=dict)
    weights: Blocks = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)
    held_out: float = 0.0


class SyntheticLoader:
    """Makes batches of random tokens in packed documents. `order`: the order of the sequences in a batch. With `vision`
    some sequences show images: see `PICTURES`.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int = SEQ_LEN,
        order: Sequence[int] = range(BATCH_SIZE),
        vision: VisionConfig | None = None,
    ) -> None:
        self.vocab_size, self.seq_len, self.order, self.vision = vocab_size, seq_len, np.array(order), vision

    def batch(self, step: int, start: int, stop: int) -> Batch:
        generator = np.random.default_rng([SEED, step])
        shape = (len(self.order), self.seq_len + 1)
        tokens = np.minimum(generator.zipf(1.3, shape), self.vocab_size) - 1
        begins = generator.random(shape) < 1 / 12  # documents of 12 tokens on average; some exceed an attention chunk
        places = np.arange(self.seq_len + 1)
        last = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        labels = np.where(begins[:, 1:], IGNORED, tokens[:, 1:])
        whole, images = [tokens[:, :-1], labels, (places - last)[:, :-1]], None
        if self.vision is not None:
            rows, tiles = _pictures(step, len(self.order), self.seq_len, self.vision.tokens_per_tile)
            whole[0] = np.where(rows < 0, whole[0], self.vision.image_token_id)
            whole[1] = np.where(np.pad(rows, ((0, 0), (0, 1)), constant_values=-1)[:, 1:] < 0, labels, IGNORED)
            here = self.order[start:stop]
            side, per_tile = self.vision.tile_size, self.vision.tokens_per_tile
            shown, decode = [tiles[i] for i in here], partial(_random_tile, side)
            images = BatchImages(torch.from_numpy(rows[here]), shown, per_tile, decode, side)
        parts = [torch.from_numpy(np.ascontiguousarray(one[self.order[start:stop]])) for one in whole]
        return Batch(parts[0], parts[1], parts[2], torch.zeros(stop - start, dtype=torch.int64), images)

    def num_held_out(self, source: str) -> int:
        return min(_HELD_OUT, len(self.order))

    def held_out(self, source: str, start: int, stop: int) -> Batch:
        unordered = SyntheticLoader(self.vocab_size, self.seq_len, range(len(self.order)), self.vision)
        return unordered.batch((1 << 20) - (self.vision is not None), start, stop)  # the first sequence shows pictures


PICTURES: list[dict[int, list[tuple[int, int]]]] = [
    {0: [(2, 1), (7, 3), (30, 1)], 2: [(46, 1)]},
    {5: [(14, 1)], 6: [(0, 1), (20, 4), (60, 1)], 7: [(31, 2)]},
    {},
]
"""For each step, in turn, the pictures of some sequences of a batch: (first position, number of tiles).

Sequences have none, one or three. Tiles of 4 tokens straddle the parts of sequences under cp and tp. Some data-parallel
ranks, some micro-batches and a whole step have none.
"""


def _pictures(step: int, count: int, seq_len: int, tokens_per_tile: int) -> tuple[Any, list[list[TileRef]]]:
    """Return the rows that the positions of a batch show, and the tiles of each sequence: see `BatchImages`."""
    rows, tiles = np.full((count, seq_len), -1), [list[TileRef]() for _ in range(count)]
    for sequence, pictures in PICTURES[step % len(PICTURES)].items():
        for number, (begin, size) in enumerate(pictures):
            here = np.arange(begin, begin + size * tokens_per_tile)
            rows[sequence, here] = here - begin + len(tiles[sequence]) * tokens_per_tile
            tiles[sequence] += [TileRef(_SOURCE, 1000 * step + 10 * sequence + number, tile) for tile in range(size)]
    return rows, tiles


def _random_tile(side: int, tile: TileRef) -> NDArray[np.uint8]:
    """Return random grey levels, the same for the same reference."""
    return np.random.default_rng([SEED, tile.image, tile.tile]).integers(0, 256, (3, side, side), np.uint8)


def copy_blocks(blocks: Iterable[LocalShard]) -> Blocks:
    """Copy a rank's blocks, grouped by parameter."""
    found: Blocks = {}
    for one in blocks:
        if one.values.numel():
            found.setdefault(one.spec.info.name, []).append((one.block, one.values.detach().clone()))
    return found


def run_case(case: CertifyCase, world: World, meshes: Meshes) -> RankResults:
    """Run `case` on this rank."""
    placed = build(case.model, case.precision, meshes, world.device, SEED, case.frozen)
    model, engine, found = placed.model, make_engine(placed, case.optimizer, SEED), RankResults()
    balancer = Balancer(model, lambda counts: meshes.world.sum(counts, "balance"))
    order = np.arange(case.batch_size)
    if case.emulates and meshes.dp.size == 1:
        order = order.reshape(case.emulates, -1).T.flatten()  # the first sequence of each rank, then the second of each
    vision = case.model.vision
    loader = SyntheticLoader(case.model.vocab_size, case.seq_len, order.tolist(), vision)
    begin, share = 0, case.batch_size // meshes.dp.size
    size = case.emulates // meshes.dp.size if case.emulates else micro_batch_size(meshes.layout)
    if case.starve:
        for balance in (module for module in model.modules() if isinstance(module, RouterBalance)):
            balance.bias_E[: len(balance.bias_E) // 2] = -1e9
    if case.resume is not None:
        progress = Checkpointer(case.resume, world, 1, False, _fail).restore(engine.state())
        assert progress is not None, f"no checkpoint in {case.resume}"
        engine.written()
        begin = progress["step"]

    def keep_gradients() -> None:
        found.gradients = found.gradients or copy_blocks(engine.gradients())

    for step in range(begin, case.steps):
        if case.save is not None and step == case.steps - 1:
            Checkpointer(case.save, world, 1, False, _fail).save(step, engine.state(), {})
        batch = local_sequences(partial(loader.batch, step), meshes, share, size)
        load_tiles(batch.images, meshes, size)
        if not case.labels:
            batch.labels_BT.fill_(IGNORED)
        result = optimizer_step(engine, balancer, batch, size, case.clip_norm, 1.0, keep_gradients)
        found.loss.append(result.loss.item())
        found.norm.append(result.gradient_norm.item())
        for key, value in result.balance.items():
            found.balance[key].append(value.cpu())
    found.balance = dict(found.balance)
    found.weights = copy_blocks(engine.weights())
    found.routers = {name: buffer.clone().cpu() for name, buffer in model.named_buffers() if "balance" in name}
    bytes_V = torch.ones(case.model.vocab_size, dtype=torch.int64)
    held_out = held_out_loss(placed, loader, bytes_V, loader.num_held_out(_SOURCE), 2, {_SOURCE: 1.0})
    found.held_out = held_out.loss
    return found


def run_cases(parallel: ParallelConfig, cases: Mapping[str, CertifyCase]) -> dict[str, RankResults]:
    """Run all `cases` on this rank under the layout `parallel`."""
    world = connect()
    meshes = make_meshes(parallel.resolve(world.size), world)
    return {name: run_case(case, world, meshes) for name, case in cases.items()}


def _fail(line: str) -> None:
    raise RuntimeError(line)
