"""The loss of single rows, spread over the ranks: what scoring by the model in training and comparing by difficulty ask
for.

Shapes: N rows, B rows at a time, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from data.loader import Batch
from parallel.fsdp import release
from parallel.parallelize import ParallelModel
from train.eval.held_out import filled
from train.loss import IGNORED, token_losses


@torch.no_grad()
def row_losses(placed: ParallelModel, take: Callable[[int, int], Batch], rows: int, micro_batch_size: int) -> Tensor:
    """Mean loss of each row in nats per labelled token, float64 [N] on every rank; NaN for a row without a label.

    `take(start, stop)` gives rows of the N. Every rank runs the model equally often, on equally many rows.
    """
    axis, sums_N2 = placed.meshes.dp, torch.zeros(rows, 2, dtype=torch.float64, device=placed.device)
    starts, first = range(0, rows, micro_batch_size), take(0, min(micro_batch_size, rows))
    placed.model.eval()
    for turn in range(0, len(starts), axis.size):
        place = turn + axis.rank
        start = starts[place] if place < len(starts) else rows
        mine = take(start, min(start + micro_batch_size, rows)) if start < rows else None
        batch = mine if axis.size == 1 and mine is not None else filled(mine, first)
        stop = min(start + micro_batch_size, rows)
        sums_N2[start:stop] += _sums(placed, batch)[: stop - start]
    placed.meshes.world.sum(sums_N2, "evaluation")
    placed.model.train()
    release(placed.stacks)
    return sums_N2[:, 0] / sums_N2[:, 1]


def _sums(placed: ParallelModel, batch: Batch) -> Tensor:
    """Nats and labelled tokens of each row, of what this rank has of it; zeros where another rank counts it: [B, 2]."""
    meshes, share = placed.meshes, placed.context_shard(batch.tokens_BT.shape[1])
    context = placed.sequence_context(batch.positions_BT)
    logits_BTV = placed.logits(share.take(batch.tokens_BT).to(placed.device), context)
    if logits_BTV is None:
        return torch.zeros(len(batch.tokens_BT), 2, dtype=torch.float64, device=placed.device)
    labels_BT = share.take(batch.labels_BT).to(placed.device)
    losses_BT = token_losses(logits_BTV, labels_BT, meshes.tp)
    sums_B2 = torch.stack([losses_BT.sum(1, dtype=torch.float64), (labels_BT != IGNORED).sum(1).double()], 1)
    return sums_B2 * (meshes.tp.rank == 0)
