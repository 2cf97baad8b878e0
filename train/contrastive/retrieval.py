"""Look for the captions of held-out pictures among the captions of all of them, and for the pictures of captions.

Shapes: N pairs, B pairs of a micro-batch, T sequence, E feature size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.vision.towers import ParallelTowers
from train.contrastive.engine import PairTokens, features, pair_batches
from train.eval.held_out import HeldOutLoader, local_batches

BLOCK = 1024
"""Rows of the matrix of all pairs' logits that are held at once."""


@dataclass(frozen=True)
class Retrieval:
    """The InfoNCE `loss` in nats per pair among `compared` pairs, as many as in a training batch, and the shares of
    pictures whose nearest caption among `pairs` is theirs (`to_text`) and of captions whose nearest picture is
    (`to_image`). `chance`: either share of features at random. Pictures of the same caption count as right for each
    other.
    """

    loss: float
    to_text: float
    to_image: float
    chance: float
    pairs: int
    compared: int


@torch.no_grad()
def held_out_retrieval(
    placed: ParallelTowers,
    loader: HeldOutLoader,
    ids: PairTokens,
    sources: Iterable[str],
    sequences: int,
    batch_size: int,
    micro_batch_size: int,
) -> Retrieval | None:
    """Compare up to `sequences` held-out pairs of each source with each other: see `compare`. None without a pair.

    All ranks call this together: each encodes a part of the pairs, and all get the result.
    """
    placed.model.eval()
    counts = {source: min(sequences, loader.num_held_out(source)) for source in sources}
    found = [_encoded(placed, loader, ids, name, count, micro_batch_size) for name, count in counts.items() if count]
    placed.model.train()
    placed.release()
    if not found:
        return None
    images_NE, texts_NE, tokens_NT = map(torch.cat, zip(*found, strict=True))
    return compare(images_NE, texts_NE, tokens_NT, placed.model.log_scale.exp(), batch_size)


def _encoded(
    placed: ParallelTowers, loader: HeldOutLoader, ids: PairTokens, source: str, count: int, micro_batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features [N, E] of a source's held-out pairs in float64, and the captions' tokens [N, T]."""
    sums: list[Tensor] = []
    take = partial(loader.held_out, source)
    for start, batch in local_batches(take, count, micro_batch_size, placed.meshes.dp):
        [pairs] = pair_batches(batch, ids, placed, len(batch.tokens_BT))
        parts = [*features(placed, pairs), pairs.texts_BT]
        sums = sums or [part.new_zeros(count, part.shape[1]) for part in parts]
        for table, part in zip(sums, parts, strict=True):
            table[start : start + micro_batch_size] += part[: max(0, count - start)]
    for table in sums:
        placed.meshes.world.sum(table, "evaluation")
    images, texts, tokens = sums
    return images.double(), texts.double(), tokens


def compare(images_NE: Tensor, texts_NE: Tensor, tokens_NT: Tensor, scale: Tensor, batch_size: int) -> Retrieval:
    """Look for each caption and picture among all of them. The loss is that of consecutive batches of `batch_size`
    pairs, or of all pairs if they are fewer; an incomplete batch is left out.
    """
    groups_N, sizes = torch.unique(tokens_NT, dim=0, return_inverse=True, return_counts=True)[1:]
    count, compared = len(groups_N), min(batch_size, len(groups_N))
    loss, found = 0.0, []
    for one_NE, other_NE in ((images_NE, texts_NE), (texts_NE, images_NE)):
        rights, losses = [], []
        for rows_BE, own_B in zip(one_NE.split(BLOCK), groups_N.split(BLOCK), strict=True):
            nearest_B = (rows_BE @ other_NE.T).argmax(1)
            rights.append(groups_N[nearest_B] == own_B)
        for start in range(0, count - compared + 1, compared):
            logits = scale * one_NE[start : start + compared] @ other_NE[start : start + compared].T
            losses.append(F.cross_entropy(logits, torch.arange(compared, device=logits.device)))
        loss += torch.stack(losses).mean().item() / 2
        found.append(torch.cat(rights).double().mean().item())
    chance = float((sizes.double() ** 2).sum()) / count**2
    return Retrieval(loss, found[0], found[1], chance, count, compared)
