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
    """InfoNCE loss among `pairs` held-out pairs in nats per pair, and the shares of pictures whose nearest caption is
    theirs (`to_text`) and of captions whose nearest picture is (`to_image`). `chance`: either share of features at
    random. Pictures of the same caption count as right for each other.
    """

    loss: float
    to_text: float
    to_image: float
    chance: float
    pairs: int


@torch.no_grad()
def held_out_retrieval(
    placed: ParallelTowers,
    loader: HeldOutLoader,
    ids: PairTokens,
    sources: Iterable[str],
    sequences: int,
    micro_batch_size: int,
) -> Retrieval | None:
    """Compare up to `sequences` held-out pairs of each source with each other. None without a held-out pair.

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
    return compare(images_NE, texts_NE, tokens_NT, placed.model.log_scale.exp())


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


def compare(images_NE: Tensor, texts_NE: Tensor, tokens_NT: Tensor, scale: Tensor) -> Retrieval:
    """Compare all pictures with all captions."""
    groups_N, sizes = torch.unique(tokens_NT, dim=0, return_inverse=True, return_counts=True)[1:]
    count, own_N = len(groups_N), torch.arange(len(groups_N), device=groups_N.device)
    loss, found = 0.0, []
    for one_NE, other_NE in ((images_NE, texts_NE), (texts_NE, images_NE)):
        right = 0
        for start in range(0, count, BLOCK):
            logits = scale * one_NE[start : start + BLOCK] @ other_NE.T
            own = own_N[start : start + BLOCK]
            loss += F.cross_entropy(logits, own, reduction="sum").item() / (2 * count)
            right += int((groups_N[logits.argmax(1)] == groups_N[own]).sum())
        found.append(right / count)
    chance = float((sizes.double() ** 2).sum()) / count**2
    return Retrieval(loss, found[0], found[1], chance, count)
