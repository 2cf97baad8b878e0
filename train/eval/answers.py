"""Measure how often the last token of a held-out document with pictures is predicted.

In documents that end with an answer of one token this is the share of right answers. The same with another document's
pictures, and without pictures, shows what the text alone gives away.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.corpus import HELD_OUT, Corpus
from data.images.store import PictureStream
from data.loader import Batch
from model.vision.config import CHANNELS
from parallel.fsdp import release
from parallel.parallelize import ParallelModel
from train.engine.images import load_tiles
from train.eval.held_out import HeldOutLoader, local_batches, predictions
from train.loss import IGNORED


class Shown(Enum):
    """Which pictures the model sees."""

    own = "own"
    other = "other"
    """Those of other documents: `PictureStream.distant`."""
    none = "none"
    """Black ones."""


@dataclass(frozen=True)
class Accuracy:
    """The fraction of `documents` whose last token is predicted, by the pictures shown."""

    documents: int
    own: float
    other: float
    none: float


MOST_KINDS = 20
"""Number of answers that are reported apart."""


@dataclass(frozen=True)
class Answers(Accuracy):
    """`by_answer`: the same for the documents that end with each token, of the `MOST_KINDS` most frequent tokens."""

    by_answer: dict[str, Accuracy] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def answers(
    placed: ParallelModel,
    loader: HeldOutLoader,
    source: str,
    sequences: int,
    micro_batch_size: int,
    corpus: Corpus,
) -> Answers | None:
    """Measure the documents in the first `sequences` held-out sequences of a source, divided over the ranks. None if no
    document ends there after a picture.
    """
    pictures = corpus.pictures(source, HELD_OUT)
    if pictures is None:
        return None
    placed.model.eval()
    count = min(sequences, loader.num_held_out(source))
    sums = torch.zeros(len(Shown), 2, corpus.tokenizer.vocab_size, dtype=torch.int64, device=placed.device)
    for _, batch in local_batches(partial(loader.held_out, source), count, micro_batch_size, placed.meshes.dp):
        for row, shown in zip(sums, Shown, strict=True):
            row += _right(placed, _with(batch, shown, placed, pictures), corpus)
    placed.meshes.world.sum(sums, "evaluation")
    placed.model.train()
    release(placed.stacks)
    right, (total, *_) = sums.cpu().unbind(1)
    found = {shown.value: row for shown, row in zip(Shown, right, strict=True)}
    return _answers(found, total, corpus) if int(total.sum()) else None


def measure(
    placed: ParallelModel,
    loader: HeldOutLoader,
    sources: Iterable[str],
    sequences: int,
    micro_batch_size: int,
    corpus: Corpus,
) -> dict[str, Answers]:
    """Return the `answers` of each source whose held-out documents have some."""
    found = {name: answers(placed, loader, name, sequences, micro_batch_size, corpus) for name in sources}
    return {name: one for name, one in found.items() if one is not None}


def _answers(right: dict[str, Tensor], documents_V: Tensor, corpus: Corpus) -> Answers:
    """Return the fractions of right answers; `right`: the number of right answers [V] by the pictures shown."""

    def fractions(tokens: list[int]) -> dict[str, Any]:
        total = int(documents_V[tokens].sum())
        return {"documents": total, **{name: int(right_V[tokens].sum()) / total for name, right_V in right.items()}}

    kinds: dict[str, list[int]] = {}
    for token in documents_V.sort(descending=True, stable=True).indices[: int((documents_V > 0).sum())].tolist():
        kinds.setdefault(corpus.tokenizer.decode([token]).strip(), []).append(token)
    by_answer = {text: Accuracy(**fractions(tokens)) for text, tokens in list(kinds.items())[:MOST_KINDS]}
    return Answers(**fractions([token for tokens in kinds.values() for token in tokens]), by_answer=by_answer)


def _with(batch: Batch, shown: Shown, placed: ParallelModel, pictures: PictureStream) -> Batch:
    """Return the batch with the pictures that the model is to see. Black ones are not decoded."""
    images = batch.images
    assert images is not None
    match shown:
        case Shown.own:
            seen = replace(images)
        case Shown.other:
            seen = replace(images, tiles=[[pictures.distant(tile) for tile in tiles] for tiles in images.tiles])
        case Shown.none:
            seen = replace(images, decode=lambda tile: np.zeros((CHANNELS, images.side, images.side), np.uint8))
    load_tiles(seen, placed.meshes, len(batch.tokens_BT))
    return replace(batch, images=seen)


def _right(placed: ParallelModel, batch: Batch, corpus: Corpus) -> Tensor:
    """Return how often each token is the last one and predicted, and how often it is the last one: int64 [2, V]."""
    size = corpus.tokenizer.vocab_size
    if (found := predictions(placed, batch)) is None:
        return torch.zeros(2, size, dtype=torch.int64, device=placed.device)
    predicted_BT, labels_BT = found
    ends_BT = last_tokens(batch, corpus)
    ends_BT = placed.context_shard(ends_BT.shape[1]).take(ends_BT).to(predicted_BT.device)
    right_BT = (predicted_BT == labels_BT) & ends_BT
    return torch.stack([torch.bincount(labels_BT[chosen_BT], minlength=size) for chosen_BT in (right_BT, ends_BT)])


def last_tokens(batch: Batch, corpus: Corpus) -> Tensor:
    """Return where the last token of a document is predicted whose first picture begins in the same sequence, bool
    [B, T]. The other documents are no test of reading pictures.
    """
    assert corpus.images is not None
    labels_BT, tokens_BT = batch.labels_BT, batch.tokens_BT
    ends_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    ends_BT[:, :-1] = (labels_BT[:, 1:] == corpus.tokenizer.eos_id) & (labels_BT[:, :-1] != IGNORED)
    begun_BT = (tokens_BT == corpus.images.ids.start).cumsum(1)
    before_BT = torch.where(batch.positions_BT == 0, begun_BT, -1).cummax(1).values  # pictures of earlier documents
    whole_BT = tokens_BT == corpus.tokenizer.bos_id
    return ends_BT & (begun_BT > before_BT) & (whole_BT.cumsum(1) > 0)
