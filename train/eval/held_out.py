"""Compute the loss of each source's held-out text, in nats per token and bits per byte, and that of single sequences.

This works under any layout. Every rank runs the model equally often and on the same number of sequences, because the
ranks of a sharded model gather its parameters together.

Shapes: N sequences, B sequences of a micro-batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from core.errors import DataError
from data.images.batch import MODALITIES
from data.loader import Batch
from parallel.fsdp import release
from parallel.mesh import MeshAxis
from parallel.parallelize import ParallelModel
from train.engine.images import batch_images, load_tiles
from train.loss import IGNORED

Take = Callable[[int, int], Batch]
"""Returns sequences [start, stop) as a batch."""


@dataclass(frozen=True)
class MeanLoss:
    """The mean `loss` of `tokens` labelled tokens in nats per token, and as `bits_per_byte` of their text."""

    loss: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class SourceLoss(MeanLoss):
    """`modalities`: the losses of those documents that show an image in their sequence (`images`), and of the others
    (`text`). Empty for data without pictures.
    """

    modalities: dict[str, MeanLoss] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """Losses of each source, and their mean with the weights in `data.sources`. The weights of a phase have no effect,
    so that all results of a run are comparable. `modalities`: the parts of the mean that are due to documents with and
    without images, as in `SourceLoss`.
    """

    loss: float
    bits_per_byte: float
    sources: dict[str, SourceLoss]
    modalities: dict[str, MeanLoss] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return the losses as for JSON, without empty `modalities`."""
        found = asdict(self)
        for one in (found, *found["sources"].values()):
            if not one["modalities"]:
                del one["modalities"]
        return found


class HeldOutLoader(Protocol):
    """The part of a loader that evaluation uses."""

    seq_len: int

    def num_held_out(self, source: str) -> int: ...

    def held_out(self, source: str, start: int, stop: int) -> Batch: ...


@torch.no_grad()
def held_out_loss(
    placed: ParallelModel,
    loader: HeldOutLoader,
    bytes_V: Tensor,
    sequences: int,
    micro_batch_size: int,
    weights: dict[str, float],
) -> HeldOut:
    """Compute the loss of the first `sequences` sequences of each source's held-out split, divided over the ranks.

    `bytes_V`: number of bytes of text of each token id. Sources without a held-out sequence of this length are dropped.
    Raises `DataError` if no source is left.
    """
    weights = {source: weight for source, weight in weights.items() if loader.num_held_out(source)}
    if not weights:
        raise DataError(f"no source has held-out text for one sequence of {loader.seq_len} tokens: raise data.held_out")
    bytes_V = bytes_V.to(placed.device)
    placed.model.eval()
    found: dict[str, SourceLoss] = {}
    for source in weights:
        # rows: all documents, those with images, those without; columns: nats, tokens, bytes
        sums = torch.zeros(1 + len(MODALITIES), 3, dtype=torch.float64, device=placed.device)
        count = min(sequences, loader.num_held_out(source))
        for _, batch in local_batches(partial(loader.held_out, source), count, micro_batch_size, placed.meshes.dp):
            sums += _sums(placed, batch, bytes_V)
        placed.meshes.world.sum(sums, "evaluation")
        whole, *parts = [_mean(*row) for row in sums.tolist()]
        apart = {name: one for name, one in zip(MODALITIES, parts, strict=True) if one.tokens}
        found[source] = SourceLoss(**vars(whole), modalities=apart)
    placed.model.train()
    release(placed.stacks)
    mean, bits = _weighted(weights, found)
    return HeldOut(mean, bits, found, _by_modality(weights, found))


def _mean(nats: float, tokens: float, size: float) -> MeanLoss:
    return MeanLoss(nats / max(tokens, 1), nats / max(size, 1) / math.log(2), int(tokens))


def _weighted(weights: Mapping[str, float], losses: Mapping[str, MeanLoss]) -> tuple[float, float]:
    """Return the weighted mean of losses in nats per token, and in bits per byte."""
    total = sum(weights.values())
    mean = sum(weights[s] * losses[s].loss for s in weights) / total
    return mean, sum(weights[s] * losses[s].bits_per_byte for s in weights) / total


def _by_modality(weights: Mapping[str, float], sources: Mapping[str, SourceLoss]) -> dict[str, MeanLoss]:
    """Return the loss of each modality over all sources. A source counts with its weight times its share of tokens."""
    found = {}
    for name in MODALITIES:
        losses = {s: one.modalities[name] for s, one in sources.items() if name in one.modalities}
        shares = {s: weights[s] * one.tokens / sources[s].tokens for s, one in losses.items()}
        if any(shares.values()):
            found[name] = MeanLoss(*_weighted(shares, losses), sum(one.tokens for one in losses.values()))
    return found


@torch.no_grad()
def sequence_losses(placed: ParallelModel, take: Take, count: int, micro_batch_size: int) -> Tensor:
    """Return the mean loss of each of `count` sequences in nats per labelled token, float64 [N] on every rank. It is
    NaN for a sequence without labels.
    """
    sums_N2 = torch.zeros(count, 2, dtype=torch.float64, device=placed.device)
    placed.model.eval()
    for start, batch in local_batches(take, count, micro_batch_size, placed.meshes.dp):
        stop = min(start + micro_batch_size, count)
        if (losses := batch_losses(placed, batch)) is not None:
            losses_BT, labels_BT = losses
            sums_B2 = torch.stack([losses_BT.sum(1, dtype=torch.float64), (labels_BT != IGNORED).sum(1).double()], 1)
            sums_N2[start:stop] += sums_B2[: stop - start]
    placed.meshes.world.sum(sums_N2, "evaluation")
    placed.model.train()
    release(placed.stacks)
    return sums_N2[:, 0] / sums_N2[:, 1]


def local_batches(take: Take, count: int, micro_batch_size: int, axis: MeshAxis) -> Iterator[tuple[int, Batch]]:
    """Yield this rank's micro-batches out of `count` sequences, each with the index of its first (padding: `count`).

    With several ranks, padding gives all micro-batches the same number of sequences. Padding sequences have no labels.
    """
    starts, full = range(0, count, micro_batch_size), take(0, min(micro_batch_size, count))
    for turn in range(0, len(starts), axis.size):
        place = turn + axis.rank
        start = starts[place] if place < len(starts) else count
        batch = take(start, min(start + micro_batch_size, count)) if start < count else None
        yield start, batch if axis.size == 1 and batch is not None else _padded(batch, full)


def _padded(batch: Batch | None, full: Batch) -> Batch:
    """Pad `batch` to as many sequences as `full`; the added sequences have no labels."""
    count = 0 if batch is None else len(batch.tokens_BT)
    spare = full.slice(count, len(full.tokens_BT))
    spare.labels_BT = torch.full_like(spare.labels_BT, IGNORED)
    return spare if batch is None else batch.concat(spare)


def batch_losses(placed: ParallelModel, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Return losses and labels [B, T] of this rank's part of a batch, or None if another rank returns the same part."""
    found = _forward(placed, batch)
    return found if placed.meshes.tp.rank == 0 else None


def predictions(placed: ParallelModel, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Return the likeliest next tokens and the labels [B, T] of this rank's part of a batch, or None if another rank
    returns the same part.
    """
    found = _forward(placed, batch, likeliest=True)
    return (found[0][..., 1].long(), found[1]) if found is not None and placed.meshes.tp.rank == 0 else None


def _forward(placed: ParallelModel, batch: Batch, likeliest: bool = False) -> tuple[Tensor, Tensor] | None:
    """Return the losses of labels [B, T], or as `ForwardContext.likeliest` says, and the labels of this rank's part of
    a batch; None if another rank has the head.
    """
    shard = placed.context_shard(batch.tokens_BT.shape[1])
    context = placed.sequence_context(batch.positions_BT)
    if batch.images is not None:
        if not batch.images.pixels:
            load_tiles(batch.images, placed.meshes, len(batch.tokens_BT))
        context.images = next(iter(batch_images(placed, batch.images, len(batch.tokens_BT))), None)
    labels_BT = shard.take(batch.labels_BT).to(placed.device)
    context.labels_BT, context.likeliest = labels_BT, likeliest
    found = placed.outputs(shard.take(batch.tokens_BT).to(placed.device), context)
    return None if found is None else (found, labels_BT)


def _sums(placed: ParallelModel, batch: Batch, bytes_V: Tensor) -> Tensor:
    """Return nats, tokens and bytes of this rank's part of a batch, or zeros if another rank counts the same part: of
    all documents and, for data with images, of those of each modality.
    """
    sums = torch.zeros(1 + len(MODALITIES), 3, dtype=torch.float64, device=placed.device)
    if (losses := batch_losses(placed, batch)) is None:
        return sums
    losses_BT, labels_BT = losses
    counted_BT = labels_BT != IGNORED
    size_BT = bytes_V[labels_BT.clamp_min(0)] * counted_BT
    sums[0] = torch.stack([losses_BT.sum(dtype=torch.float64), counted_BT.sum().double(), size_BT.sum().double()])
    if batch.images is not None:
        with_images_BT = batch.images.documents_with_images(batch.positions_BT)
        here_BT = placed.context_shard(with_images_BT.shape[1]).take(with_images_BT).to(placed.device)
        parts_3BT = torch.stack([losses_BT.double(), counted_BT.double(), size_BT.double()])
        sums[1], sums[2] = (parts_3BT * here_BT).sum((1, 2)), (parts_3BT * ~here_BT).sum((1, 2))
    return sums
