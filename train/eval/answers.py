"""Measure how often the last token of a held-out document with pictures is predicted.

In documents that end with an answer of one token this is the share of right answers. The same with another document's
pictures, and without pictures, shows what the text alone gives away.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from data.loader import Batch
from parallel.fsdp import release
from parallel.parallelize import ParallelModel
from train.engine.images import load_tiles
from train.eval.held_out import HeldOutLoader, local_batches, predictions
from train.loss import IGNORED


class Shown(Enum):
    """Which pictures the model sees."""

    own = "own"
    other = "other"
    """Those of other documents: each tile is replaced by the next one of the micro-batch."""
    none = "none"
    """Black ones."""


@dataclass(frozen=True)
class Answers:
    """The fraction of `documents` whose last token is predicted, by the pictures shown."""

    documents: int
    own: float
    other: float
    none: float


@torch.no_grad()
def answers(
    placed: ParallelModel, loader: HeldOutLoader, source: str, sequences: int, micro_batch_size: int, eos_id: int
) -> Answers:
    """Measure the documents in the first `sequences` held-out sequences of a source, divided over the ranks."""
    placed.model.eval()
    found, total = {}, 0
    count = min(sequences, loader.num_held_out(source))
    for shown in Shown:
        sums = torch.zeros(2, dtype=torch.float64, device=placed.device)  # right, documents
        for _, batch in local_batches(partial(loader.held_out, source), count, micro_batch_size, placed.meshes.dp):
            sums += _right(placed, _with(batch, shown, placed), eos_id)
        placed.meshes.world.sum(sums, "evaluation")
        total = int(sums[1])
        found[shown.value] = float(sums[0]) / max(total, 1)
    placed.model.train()
    release(placed.stacks)
    return Answers(total, **found)


def _with(batch: Batch, shown: Shown, placed: ParallelModel) -> Batch:
    assert batch.images is not None
    load_tiles(batch.images, placed.meshes, len(batch.tokens_BT))
    if shown is not Shown.own:
        batch.images.pixels = [
            tiles.roll(1, 0) if shown is Shown.other else torch.zeros_like(tiles) for tiles in batch.images.pixels
        ]
    return batch


def _right(placed: ParallelModel, batch: Batch, eos_id: int) -> Tensor:
    """Return how many last tokens are predicted, and how many there are, on this rank."""
    if (found := predictions(placed, batch)) is None:
        return torch.zeros(2, dtype=torch.float64, device=placed.device)
    predicted_BT, labels_BT = found
    assert batch.images is not None
    ends_BT = torch.zeros_like(batch.labels_BT, dtype=torch.bool)
    ends_BT[:, :-1] = (batch.labels_BT[:, 1:] == eos_id) & (batch.labels_BT[:, :-1] != IGNORED)
    ends_BT &= (batch.images.rows_BT >= 0).cumsum(1) > 0  # a document whose picture is before the sequence is no test
    ends_BT = placed.context_shard(ends_BT.shape[1]).take(ends_BT).to(predicted_BT.device)
    right = (predicted_BT == labels_BT) & ends_BT
    return torch.stack([right.sum().double(), ends_BT.sum().double()])
