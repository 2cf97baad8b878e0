"""Check whether a scorer's model was trained on the records that it is to score: memorised text looks easy.

The corpus of a run holds its training tokens. A sample of its documents is decoded to text, and the records are looked
up in the sample, to estimate the fraction of the records that the run was trained on. The estimate may be 0 for a very
small fraction. It does not count documents that were truncated (`data.long_documents=truncate`), are very long, or
differ from the record by more than white space. It is too high if the run ended before the end of its corpus. A model
that is not a run gets no estimate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import ConfigError
from core.files import sha256_text
from data.corpus import TRAIN, Corpus
from data.filter.input.records import Record
from data.filter.score.factory import Models
from data.tokens import TokenStream
from parallel.comm.world import World
from train.corpus import stored_corpus
from train.eval.text_features import open_features
from train.eval.text_loss import open_losses
from train.run_directory import load_config

SAMPLE = 4096
"""Number of training documents in the sample."""
MOST = 0.05
"""Largest fraction of the records that a model may have been trained on: up to it a warning, above it an error."""
_LOOK_AHEAD = (1 << 14, 1 << 18)
"""Tokens in which to look for a whole document, in the first and the second attempt. Longer documents are skipped."""


@dataclass(frozen=True)
class TrainedTexts:
    """Hashes of the texts of `sampled` out of `documents` training documents of the run `name`."""

    name: str
    sample: frozenset[str]
    sampled: int
    documents: int

    def share(self, records: Iterable[Record]) -> float:
        """Estimate the fraction of these records that the run was trained on, 0 to 1."""
        count = hits = 0
        for record in records:
            count += 1
            hits += text_hash(record.text) in self.sample
        return min(1.0, hits / max(count, 1) * self.documents / max(self.sampled, 1))


def check_unseen(name: str, records: Iterable[Record]) -> str | None:
    """Return a warning if the model's training data are unknown or contain a few of the records, or None.

    Raises `ConfigError` (with an empty key) if the run was trained on more than `MOST` of the records.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.yaml").exists():
        return f"{name} is not a run: whether it was trained on these records cannot be known"
    share = seen_by(folder).share(records)
    advice = "memorised text looks easy"
    if share > MOST:
        reason = f"was trained on about {share:.0%} of the records that it is to score, and {advice}; train it on other"
        raise ConfigError("", name, f"{reason} text, or use scorer.kind=ngram, which learns from the other half")
    return f"{name} was trained on about {share:.2%} of the records: {advice}" if share else None


def seen_by(directory: Path, size: int = SAMPLE) -> TrainedTexts:
    """Hash documents of a run's corpus: all of them if there are at most `size`, or about `size`, evenly spread."""
    config = load_config(directory)
    corpus = stored_corpus(directory, config, World(0, 1, torch.device("cpu")), lambda line: None, MODELS)
    documents = {s: int(corpus.manifest["sources"][s][TRAIN]["counts"]["documents"]) for s in corpus.sources}
    total, sampled, found = sum(documents.values()), 0, set()
    for source, count in documents.items():
        stream = corpus.stream(source, TRAIN)
        specials = np.array([corpus.tokenizer.bos_id, corpus.tokenizer.eos_id])
        some = every(stream, specials) if total <= size else spread(stream, specials, -(-size * count // total))
        for ids in some:
            sampled += 1
            found.add(text_hash(text_of(ids, corpus)))
    return TrainedTexts(str(directory), frozenset(found), sampled, total)


def text_of(ids: NDArray[np.int64], corpus: Corpus) -> str:
    """Decode a document. Its pictures leave a line break, as in the text of a record."""
    if corpus.images is None:
        return corpus.tokenizer.decode(ids.tolist())
    in_picture = np.isin(ids, list(vars(corpus.images.ids).values()))
    borders = np.flatnonzero(np.diff(in_picture)) + 1
    pieces = [
        piece for piece, mark in zip(np.split(ids, borders), np.split(in_picture, borders), strict=True) if not mark[0]
    ]
    return "\n".join(corpus.tokenizer.decode(piece.tolist()) for piece in pieces)


def every(stream: TokenStream, specials: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield the token ids of each document."""
    at = 0
    while at < len(stream):
        ids, at = _next_document(stream, specials, at)
        if len(ids):
            yield ids


def spread(stream: TokenStream, specials: NDArray[np.int64], count: int) -> Iterator[NDArray[np.int64]]:
    """Yield the first document that begins after each of `count` evenly spaced positions. The document that
    contains the position would more often be a long one.
    """
    before = -1
    for place in np.linspace(0, len(stream), count, endpoint=False).astype(int).tolist():
        ids, end = _next_document(stream, specials, place)
        if len(ids) and end != before:
            yield ids
            before = end


def _next_document(stream: TokenStream, specials: NDArray[np.int64], at: int) -> tuple[NDArray[np.int64], int]:
    """Return the ids of the first whole document after the first of `specials` from `at` on, and the position of its
    end. Return no ids if the stream or the look-ahead ends first.
    """
    end = at
    for length in _LOOK_AHEAD:
        end = min(at + length, len(stream))
        ids = stream.window(at, end - at)
        marks = np.flatnonzero(np.isin(ids, specials))
        gaps = np.flatnonzero(np.diff(marks) > 1)
        if len(gaps):
            begin, stop = marks[gaps[0]] + 1, marks[gaps[0] + 1]
            return ids[begin:stop], at + int(stop)
    return np.zeros(0, np.int64), end


def text_hash(text: str) -> str:
    """Hash a text with normalised white space, because tokenizers may lose spaces at its ends."""
    return sha256_text(" ".join(text.split()))


MODELS: Models = Models(
    lambda name, config: open_losses(name, config, MODELS),
    check_unseen,
    lambda name, config: open_features(name, config, MODELS),
)
"""Opens and checks the models that a filter scores with. The corpora of these models may be filtered by models too."""
