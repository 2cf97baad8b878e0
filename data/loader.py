"""Batches as a pure function of (seed, manifest, filter generation, phase, step).

The world size enters only when a batch is sliced, so any number of ranks sees the same global batches, and a resumed
run needs nothing but its step.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ConfigError
from data.corpus import HELD_OUT, TRAIN, Corpus
from data.order import Blend, key_of, permute

IGNORED = -100


@dataclass
class Batch:
    """Rows of a step; all int64. Labels are the next tokens, `IGNORED` where the next token opens another document.
    Positions restart at 0 with each document and with each row. `sources_B` indexes the corpus's sources.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    sources_B: Tensor

    def slice(self, start: int, stop: int) -> Batch:
        return Batch(*(tensor[start:stop] for tensor in self._tensors()))

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.tokens_BT, self.labels_BT, self.positions_BT, self.sources_B


class Loader:
    """Rows of `context` tokens. Each source's rows are permuted anew in every epoch of that source."""

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        global_batch: int,
        seed: int,
        phase: str = "",
        weights: Mapping[str, float] | None = None,
        generation: int = 0,
    ) -> None:
        weights = dict(weights) if weights is not None else dict.fromkeys(corpus.sources, 1.0)
        self.corpus, self.context, self.global_batch = corpus, context, global_batch
        self.identity = (seed, corpus.fingerprint, generation, phase)
        self.blend = Blend(weights, key_of(*self.identity, "blend"))
        self._streams = [corpus.stream(name, TRAIN) for name in self.blend.names]
        self._in_corpus = np.array([corpus.sources.index(name) for name in self.blend.names])
        for name, stream in zip(self.blend.names, self._streams, strict=True):
            if stream.rows(context) < 1:
                reason = f"has {len(stream)} training tokens, less than one row of {context} tokens and a label"
                raise ConfigError(f"data.sources.{name}", None, f"{reason}; give it more text or shorten the context")

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of the global batch of `step` (counted from the phase's begin)."""
        stop = self.global_batch if stop is None else stop
        ordinals = np.arange(step * self.global_batch + start, step * self.global_batch + stop)
        sources, within = self.blend.locate(ordinals)
        windows = np.empty((len(ordinals), self.context + 1), np.int64)
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            stream, rows = self._streams[source], self._rows(int(source), within[here])
            for place, row in zip(here, rows, strict=True):
                windows[place] = stream.window(int(row) * self.context, self.context + 1)
        return self._assemble(windows, self._in_corpus[sources])

    def held_out_rows(self, source: str) -> int:
        return self.corpus.stream(source, HELD_OUT).rows(self.context)

    def held_out(self, source: str, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the source's held-out stream, in its order."""
        stream = self.corpus.stream(source, HELD_OUT)
        windows = np.empty((stop - start, self.context + 1), np.int64)
        for place, row in enumerate(range(start, stop)):
            windows[place] = stream.window(row * self.context, self.context + 1)
        return self._assemble(windows, np.full(stop - start, self.corpus.sources.index(source)))

    def _rows(self, source: int, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which rows of its stream a source gives as its `ordinals`-th samples."""
        count = self._streams[source].rows(self.context)
        epochs, rows = np.divmod(ordinals, count)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = key_of(*self.identity, self.blend.names[source], epoch)
            rows[here] = permute(rows[here], count, key)
        return rows

    def _assemble(self, windows: NDArray[np.int64], sources: NDArray[np.int64]) -> Batch:
        bos = self.corpus.tokenizer.bos_id
        tokens, labels = windows[:, :-1], windows[:, 1:].copy()
        labels[labels == bos] = IGNORED
        places = np.broadcast_to(np.arange(self.context), tokens.shape)
        starts = np.maximum.accumulate(np.where(tokens == bos, places, 0), axis=1)
        arrays = (np.ascontiguousarray(tokens), labels, places - starts, sources.astype(np.int64))
        return Batch(*(torch.from_numpy(array) for array in arrays))
