"""Batches as a pure function of (seed, manifest, filter generation, phase, step).

The world size enters only when a batch is sliced, so any number of ranks sees the same global batches, and a resumed
run needs nothing but its step.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ConfigError
from data.corpus import HELD_OUT, TRAIN, Corpus
from data.sampling import Blend, SampleRange, key_of, permute

IGNORED = -100
"""Label of a position that has no next token of its own document."""
LEAST_SHARE = 2.0**-20
"""Of a source in a blend."""


@dataclass
class Batch:
    """Rows of a step; all int64. Labels are the next tokens, `IGNORED` where the next token opens another document or
    is padding, which counts to the document before it. Positions restart at 0 with each document and with each row.
    `sources_B` indexes the corpus's sources.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    sources_B: Tensor

    def slice(self, start: int, stop: int) -> Batch:
        return Batch(*(tensor[start:stop] for tensor in self._tensors()))

    def joined(self, other: Batch) -> Batch:
        """These rows, then those of `other`."""
        return Batch(*(torch.cat(pair) for pair in zip(self._tensors(), other._tensors(), strict=True)))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.tokens_BT, self.labels_BT, self.positions_BT, self.sources_B


@dataclass(frozen=True)
class PhaseOffset:
    """Where the sources stand when a phase begins: `rows` of each have been given in the order that is named after the
    phase `origin` (None: this one).
    """

    origin: str | None = None
    rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """Neighbouring samples from `begin` on: source and row of each."""

    begin: int
    sources: list[int]
    rows: list[int]


class Loader:
    """Rows of `context` tokens. Each source's rows are permuted anew in every epoch of that source.

    `weights`: shares of the rows, or of what is not padding where a corpus is padded; rows of equal length make them
    shares of the tokens. `left`: after so many more rows a source is left out. `past`: what went before this phase.
    """

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        global_batch_size: int,
        seed: int,
        phase: str = "",
        weights: Mapping[str, float] | None = None,
        generation: int = 0,
        past: PhaseOffset | None = None,
        left: Mapping[str, int] | None = None,
    ) -> None:
        weights = dict(weights) if weights is not None else dict.fromkeys(corpus.sources, 1.0)
        past = past or PhaseOffset()
        self.corpus, self.context, self.global_batch_size = corpus, context, global_batch_size
        self.identity = (seed, corpus.fingerprint, generation, phase if past.origin is None else past.origin)
        self.blend = Blend(
            _blended(weights, corpus), key_of(seed, corpus.fingerprint, generation, phase, "blend"), left
        )
        self._streams = [corpus.stream(name, TRAIN) for name in self.blend.names]
        self._in_corpus = [corpus.sources.index(name) for name in self.blend.names]
        self._places, self._bos, self._eos = np.arange(context), corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
        self._past = np.array([past.rows.get(name, 0) for name in self.blend.names], np.int64)
        self._kept = _Rows(0, [], [])
        if corpus.row_tokens not in (None, context):
            reason = f"the corpus is packed for rows of {corpus.row_tokens} tokens"
            raise ConfigError("training.seq_len", context, reason, [corpus.row_tokens])
        for name, stream in zip(self.blend.names, self._streams, strict=True):
            if stream.rows(context) < 1:
                reason = f"has {len(stream)} training tokens, less than one row of {context} tokens and a label"
                raise ConfigError(f"data.sources.{name}", None, f"{reason}; give it more text or shorten the context")

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of the global batch of `step` (counted from the phase's begin)."""
        stop = self.global_batch_size if stop is None else stop
        return self.samples(range(step * self.global_batch_size + start, step * self.global_batch_size + stop))

    def samples(self, ordinals: Sequence[int]) -> Batch:
        """The samples of these ordinals, counted from the phase's begin; ascending ones are read fastest."""
        windows, sources = np.empty((len(ordinals), self.context + 1), np.int64), np.empty(len(ordinals), np.int64)
        for place, ordinal in enumerate(ordinals):
            here = self._rows_around(ordinal)
            source, row = here.sources[ordinal - here.begin], here.rows[ordinal - here.begin]
            sources[place] = self._in_corpus[source]
            self._streams[source].read(row * self.context, windows[place])
        return self._assemble(windows, sources)

    def locate(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of samples by ascending ordinals: place of the source among `blend.names`, and row of its stream."""
        sources, rows, place = np.empty_like(ordinals), np.empty_like(ordinals), 0
        while place < len(ordinals):
            here = self._rows_around(int(ordinals[place]))
            stop = int(np.searchsorted(ordinals, here.begin + len(here.rows)))
            inside = ordinals[place:stop] - here.begin
            sources[place:stop], rows[place:stop] = np.asarray(here.sources)[inside], np.asarray(here.rows)[inside]
            place = stop
        return sources, rows

    def held_out_rows(self, source: str) -> int:
        return self.corpus.stream(source, HELD_OUT).rows(self.context)

    def held_out(self, source: str, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the source's held-out stream, in its order."""
        stream = self.corpus.stream(source, HELD_OUT)
        windows = np.empty((stop - start, self.context + 1), np.int64)
        for place, row in enumerate(range(start, stop)):
            stream.read(row * self.context, windows[place])
        return self._assemble(windows, np.full(stop - start, self.corpus.sources.index(source)))

    def _rows_around(self, ordinal: int) -> _Rows:
        """Source and row of a sample and its neighbours. The last ones are kept: steps follow each other. Threads may
        ask at once, so what is returned is not looked up again.
        """
        kept = self._kept
        if not kept.begin <= ordinal < kept.begin + len(kept.rows):
            here: SampleRange = self.blend.stretch(ordinal)
            rows = here.within + self._past[here.sources]
            for source in np.unique(here.sources):
                own = here.sources == source
                rows[own] = self._rows(int(source), rows[own])
            kept = self._kept = _Rows(here.begin, here.sources.tolist(), rows.tolist())
        return kept

    def _rows(self, source: int, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which rows of its stream a source gives as the `ordinals`-th of its order."""
        count = self._streams[source].rows(self.context)
        epochs, rows = np.divmod(ordinals, count)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = key_of(*self.identity, self.blend.names[source], epoch)
            rows[here] = permute(rows[here], count, key)
        return rows

    def _assemble(self, windows: NDArray[np.int64], sources: NDArray[np.int64]) -> Batch:
        tokens, labels = windows[:, :-1], windows[:, 1:].copy()
        positions = np.empty_like(labels)
        positions[:] = self._places
        for row, place in np.argwhere(windows == self._bos).tolist():
            if place > 0:
                labels[row, place - 1] = IGNORED
            if place < self.context:
                positions[row, place:] = self._places[: self.context - place]
        if self.corpus.is_padded:
            labels[tokens == self._eos] = IGNORED
        arrays = (np.ascontiguousarray(tokens), labels, positions, sources)
        return Batch(*(torch.from_numpy(array) for array in arrays))


def _blended(weights: Mapping[str, float], corpus: Corpus) -> dict[str, float]:
    """Shares of rows that make `weights` the shares of tokens that are not padding."""
    total = sum(weights.values())
    for name, weight in weights.items():
        corpus.stream(name, TRAIN)
        if 0 < weight < LEAST_SHARE * total:
            reason = f"is less than one row in {1 / LEAST_SHARE:,.0f}; raise it or leave the source out"
            raise ConfigError(f"data.sources.{name}.weight", weight, reason)
    return {name: weight / (1 - corpus.padding(name)) for name, weight in weights.items() if weight}
