"""Make batches that are a pure function of (seed, manifest, exclusions, phase, step).

The world size enters only when a batch is sliced: any number of ranks sees the same global batches, and a resumed run
needs only its step.

Exclusions remove documents from a step on. What is permuted is sequences, so every sequence that holds one of their
tokens is replaced by another of the same source. All other sequences keep their places: earlier steps, the windows of
online filtering and the limits of epochs do not change. Nothing excluded enters a forward pass, where even masked
tokens could spread NaN. The price: the other documents in these sequences are skipped too, and each replacement is seen
once more in its epoch.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ConfigError, DataError
from data.corpus import HELD_OUT, TRAIN, Corpus
from data.images.batch import BatchImages, TileRef
from data.images.store import PictureStream
from data.sampling import Blend, Exclusion, SampleRange, key_of, permute
from data.tokens import TokenStream, rebuild

IGNORED = -100
"""Label of a position whose next token belongs to another document, to a picture, or is padding."""
LEAST_SHARE = 2.0**-20
"""Smallest fraction of a blend that a source can have."""


@dataclass
class Batch:
    """Sequences of a step, as int64 tensors. Labels are the next tokens, or `IGNORED`. Padding belongs to the preceding
    document. Positions restart at 0 with each document and each sequence. `sources_B`: indices into `Corpus.sources`.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    sources_B: Tensor
    images: BatchImages | None = None
    """The images, or None if no source has any."""
    ahead: object | None = None
    """What an engine has prepared of the whole batch ahead of its step."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens_BT, self.labels_BT, self.positions_BT, self.sources_B

    def slice(self, start: int, stop: int) -> Batch:
        images = None if self.images is None else self.images.slice(start, stop)
        tokens, labels, positions, sources = (tensor[start:stop] for tensor in self.tensors)
        return Batch(tokens, labels, positions, sources, images)

    def concat(self, other: Batch) -> Batch:
        images = None
        if self.images is not None and other.images is not None:
            images = self.images.concat(other.images)
        tokens, labels, positions, sources = map(torch.cat, zip(self.tensors, other.tensors, strict=True))
        return Batch(tokens, labels, positions, sources, images)


class Loader:
    """Make the batches of one phase. The sequences of a source are permuted again in each of its epochs.

    `weights`: relative fractions of the tokens without padding. `limits`: sequences after which a source is dropped.
    `origin`: the phase whose order of sequences continues (None: this phase). `taken`: sequences taken in that order,
    by source. Raises `ConfigError` for a source shorter than one sequence, or a corpus packed for another `seq_len`.
    """

    def __init__(
        self,
        corpus: Corpus,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        phase: str = "",
        weights: Mapping[str, float] | None = None,
        origin: str | None = None,
        taken: Mapping[str, int] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        weights = dict(weights) if weights is not None else dict.fromkeys(corpus.sources, 1.0)
        self.corpus, self.seq_len, self.global_batch_size = corpus, seq_len, global_batch_size
        # the constant 0 keeps the order of runs that older versions began
        self.identity = (seed, corpus.fingerprint, 0, phase if origin is None else origin)
        key = key_of(seed, corpus.fingerprint, 0, phase, "blend")
        self.blend = Blend(_sequence_shares(weights, corpus), key, limits)
        self._streams = [corpus.stream(name, TRAIN) for name in self.blend.names]
        self._pictures = [corpus.pictures(name, TRAIN) for name in self.blend.names]
        self._in_corpus = np.array([corpus.sources.index(name) for name in self.blend.names], np.int64)
        self._positions, self._bos, self._eos = np.arange(seq_len), corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
        self._offsets = np.array([(taken or {}).get(name, 0) for name in self.blend.names], np.int64)
        self._last = SampleRange(0, self._offsets[:0], self._offsets[:0])
        self._excluded: dict[int, NDArray[np.int64]] = {}
        if corpus.packed_seq_len not in (None, seq_len):
            reason = f"the corpus is packed for sequences of {corpus.packed_seq_len} tokens"
            raise ConfigError("training.seq_len", seq_len, reason, [corpus.packed_seq_len])
        for name, stream in zip(self.blend.names, self._streams, strict=True):
            if stream.num_sequences(seq_len) < 1:
                reason = f"has {len(stream)} training tokens, less than one sequence of {seq_len} tokens and a label"
                raise ConfigError(f"data.sources.{name}", None, f"{reason}; add text or lower training.seq_len")

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Return sequences [start, stop) of the global batch of `step`, counted from the start of the phase."""
        stop = self.global_batch_size if stop is None else stop
        return self.samples(range(step * self.global_batch_size + start, step * self.global_batch_size + stop), step)

    def samples(self, ordinals: Sequence[int], step: int | None = None) -> Batch:
        """Return the samples with these ordinals as `step` reads them, both counted from the start of the phase. None:
        as without exclusions.
        """
        steps = None if step is None else np.full(len(ordinals), step)
        return self.read(*self.locate(np.asarray(ordinals, np.int64), steps))

    def read(self, sources: NDArray[np.int64], sequences: NDArray[np.int64]) -> Batch:
        """Return sequences of the sources' streams, named as by `locate`."""
        streams = [self._streams[source] for source in sources.tolist()]
        pictures = [self._pictures[source] for source in sources.tolist()]
        return self._assemble(streams, sequences.tolist(), self._in_corpus[sources], pictures)

    def exclude(self, exclusions: Sequence[Exclusion], start: int) -> None:
        """Exclude documents from now on, and no others. `start`: the run's step at which the phase begins.

        Raises `ConfigError` if a source has no such tokens, or no sequence left.
        """
        found: dict[int, list[tuple[int, int, int]]] = {}
        for one in exclusions:
            stream = self.corpus.stream(one.source, TRAIN)
            if not 0 <= one.start < one.stop <= len(stream):
                reason = f"excludes tokens {one.start:,} to {one.stop:,} of {one.source}, which has {len(stream):,}"
                raise ConfigError("recovery.exclusions", None, f"{reason}: it is of another run")
            if one.source in self.blend.names:
                place = self.blend.names.index(one.source)
                found.setdefault(place, []).append((*one.sequences(self.seq_len), one.step - start))
        excluded = {source: np.array(rows, np.int64) for source, rows in found.items()}
        for source, rows in excluded.items():
            count = self._streams[source].num_sequences(self.seq_len)
            if _count_covered(rows, count) == count:
                reason = f"leaves no sequence of source {self.blend.names[source]}: drop the source or some exclusions"
                raise ConfigError("recovery.exclusions", None, reason)
        self._excluded = excluded

    def locate(
        self, ordinals: NDArray[np.int64], steps: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the source of each sample, as an index into `blend.names`, and its sequence's number in the stream.

        `steps`: the step that reads each sample, counted from the start of the phase, on which exclusions depend.
        None: without exclusions.
        """
        sources, sequences, start = np.empty_like(ordinals), np.empty_like(ordinals), 0
        order = np.argsort(ordinals, kind="stable")
        ascending = ordinals[order]
        while start < len(order):
            here = self._range_around(int(ascending[start]))
            stop = int(np.searchsorted(ascending, here.begin + len(here.sources)))
            places, inside = order[start:stop], ascending[start:stop] - here.begin
            sources[places], sequences[places] = here.sources[inside], here.within[inside]
            start = stop
        if steps is not None:
            for source, rows in self._excluded.items():
                self._replace(source, rows, sources, sequences, steps)
        return sources, sequences

    def _replace(
        self,
        source: int,
        excluded: NDArray[np.int64],
        sources: NDArray[np.int64],
        sequences: NDArray[np.int64],
        steps: NDArray[np.int64],
    ) -> None:
        """Replace the excluded sequences of a source, in place, by others that only the replaced sequence and the
        exclusions determine. `excluded`: a row (first sequence, last sequence, step) for each exclusion.
        """
        count, places, draw = self._streams[source].num_sequences(self.seq_len), np.flatnonzero(sources == source), 0
        while True:
            first, last, step = excluded.T[:, :, None]
            here = sequences[places]
            places = places[((first <= here) & (here <= last) & (step <= steps[places])).any(0)]
            if not len(places):
                return
            key = key_of(*self.identity, self.blend.names[source], "replacement", draw)
            sequences[places] = permute(sequences[places], count, key)
            draw += 1

    def num_held_out(self, source: str) -> int:
        return self.corpus.stream(source, HELD_OUT).num_sequences(self.seq_len)

    def held_out(self, source: str, start: int, stop: int) -> Batch:
        """Return sequences [start, stop) of the source's held-out stream, in stream order."""
        count = stop - start
        streams = [self.corpus.stream(source, HELD_OUT)] * count
        pictures = [self.corpus.pictures(source, HELD_OUT)] * count
        number = self.corpus.sources.index(source)
        return self._assemble(streams, range(start, stop), np.full(count, number), pictures)

    def _range_around(self, ordinal: int) -> SampleRange:
        """Locate a sample and its neighbours. `within` of the result is the number of the sequence in the source's
        stream. The last result is cached, because consecutive steps use neighbouring samples. The local variable is
        returned, since another thread may replace the cached result.
        """
        last = self._last
        if not last.begin <= ordinal < last.begin + len(last.sources):
            here = self.blend.range_around(ordinal)
            sequences = here.within + self._offsets[here.sources]
            for source in np.unique(here.sources):
                own = here.sources == source
                sequences[own] = self._shuffled(int(source), sequences[own])
            last = self._last = replace(here, within=sequences)
        return last

    def _shuffled(self, source: int, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sequences at these ordinals in the permuted order of a source."""
        count = self._streams[source].num_sequences(self.seq_len)
        epochs, sequences = np.divmod(ordinals, count)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = key_of(*self.identity, self.blend.names[source], epoch)
            sequences[here] = permute(sequences[here], count, key)
        return sequences

    def _assemble(
        self,
        streams: Sequence[TokenStream],
        sequences: Sequence[int],
        sources: NDArray[np.int64],
        pictures: Sequence[PictureStream | None],
    ) -> Batch:
        windows = np.empty((len(streams), self.seq_len + 1), np.int64)
        for window, stream, sequence in zip(windows, streams, sequences, strict=True):
            stream.read(sequence * self.seq_len, window)
        tokens, labels = windows[:, :-1], windows[:, 1:].copy()
        positions = np.empty_like(labels)
        positions[:] = self._positions
        for row, place in np.argwhere(windows == self._bos).tolist():
            if place > 0:
                labels[row, place - 1] = IGNORED
            if place < self.seq_len:
                positions[row, place:] = self._positions[: self.seq_len - place]
        if self.corpus.is_padded:
            labels[tokens == self._eos] = IGNORED
        if self.corpus.images is not None:  # pictures are not predicted
            labels[np.isin(labels, list(vars(self.corpus.images.ids).values()))] = IGNORED
        arrays = (np.ascontiguousarray(tokens), labels, positions, sources)
        tokens_BT, labels_BT, positions_BT, sources_B = map(torch.from_numpy, arrays)
        return Batch(tokens_BT, labels_BT, positions_BT, sources_B, self._images(tokens, sequences, pictures))

    def _images(
        self, tokens: NDArray[np.int64], sequences: Sequence[int], pictures: Sequence[PictureStream | None]
    ) -> BatchImages | None:
        """Find the tiles of each sequence; None if the corpus has no pictures. Raises `DataError` unless exactly the
        placeholders belong to pictures.
        """
        if self.corpus.images is None:
            return None
        rows = np.full(tokens.shape, -1, np.int64)
        tiles: list[list[TileRef]] = [[] for _ in sequences]
        for row, (sequence, stream) in enumerate(zip(sequences, pictures, strict=True)):
            if stream is not None:
                rows[row], tiles[row] = stream.rows_of(sequence * self.seq_len, self.seq_len)
        if not np.array_equal(rows >= 0, tokens == self.corpus.images.ids.patch):
            raise DataError(
                f"the pictures of {self.corpus.directory} do not fit its tokens: {rebuild(self.corpus.directory)}"
            )
        config = self.corpus.images.tiles
        return BatchImages(torch.from_numpy(rows), tiles, config.tokens_per_tile, self.corpus.decode, config.tile_size)


def _count_covered(ranges: NDArray[np.int64], count: int) -> int:
    """Count the sequences among the first `count` that lie in one of the ranges [first, last]."""
    covered, reached = 0, 0
    for first, last in sorted((first, min(last, count - 1)) for first, last, _ in ranges.tolist()):
        covered += max(0, last + 1 - max(first, reached))
        reached = max(reached, last + 1)
    return covered


def _sequence_shares(weights: Mapping[str, float], corpus: Corpus) -> dict[str, float]:
    """Convert weights of the tokens without padding into weights of the sequences."""
    total = sum(weights.values())
    for name, weight in weights.items():
        corpus.stream(name, TRAIN)
        if 0 < weight < LEAST_SHARE * total:
            reason = f"is less than one sequence in {1 / LEAST_SHARE:,.0f}; raise it or drop the source"
            raise ConfigError(f"data.sources.{name}.weight", weight, reason)
    return {name: weight / (1 - corpus.padding(name)) for name, weight in weights.items() if weight}
