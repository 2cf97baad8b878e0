"""Prepare this rank's sequences of each global batch, and count the data consumed between two log lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.loader import IGNORED, Batch, Loader
from data.prefetch import Prefetcher
from data.sampling import Exclusion
from model.attention.plan import squared_lengths
from model.flops import mean_lengths
from parallel.mesh import Meshes
from train.config import Phase, TrainConfig
from train.engine.images import load_tiles, local_sequences
from train.online_filter import OnlineWindow


class StepBatches:
    """Prepares this rank's batches in advance, for consecutive steps. Sequences come in the order of the phase or, with
    online filtering, from the window last passed to `select`. The ranks of `meshes.dp` take different sequences of a
    global batch. Of its images, each rank decodes the tiles that it encodes.
    """

    _squares: dict[int | None, int]
    _sequences: Tensor

    def __init__(
        self, config: TrainConfig, phases: Sequence[Phase], loaders: Mapping[str, Loader], meshes: Meshes, eos_id: int
    ) -> None:
        self.phases, self.loaders, self.meshes, self.axis, self.eos_id = phases, loaders, meshes, meshes.dp, eos_id
        self.sources = next(iter(loaders.values())).corpus.sources
        self.chunks = list(dict.fromkeys(layer.attention_chunk_size for layer in config.model.blocks))
        self.lengths: dict[int | None, float] = {}
        """Lengths of the documents between the last two calls of `read`, for `training_flops`."""
        self.prepare: Callable[[Batch, int], None] = lambda batch, micro_batch_size: None
        """Prepares a batch for its step further: see `Engine.prepare`."""
        self.window = OnlineWindow() if config.online.every else None
        self._prefetcher = Prefetcher(self._make, config.data.prefetch)
        self._reset()

    def phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.stop)

    def exclude(self, exclusions: Sequence[Exclusion]) -> None:
        """Exclude documents, and no others, from now on. Raises `ConfigError` as `Loader.exclude` does."""
        for phase in self.phases:
            self.loaders[phase.name].exclude(exclusions, phase.start)
        self._prefetcher.forget()

    def select(self, window: OnlineWindow) -> None:
        """From the first step of `window` on, take its sequences."""
        self.window = window

    def get(self, step: int) -> Batch:
        """Return this rank's sequences of `step` and count them."""
        begin = time.perf_counter()
        batch = self._prefetcher.get(step, self._known_until(step))
        self.waited_s += time.perf_counter() - begin
        self._positions += batch.labels_BT.numel()
        for chunk in self.chunks:
            self._squares[chunk] += squared_lengths(batch.positions_BT, chunk)
        self._labelled += int((batch.labels_BT != IGNORED).sum())
        ends = batch.tokens_BT == self.eos_id
        self._padding += int((ends[:, 1:] & ends[:, :-1]).sum())  # EOS after EOS occurs only as padding
        self._tiles += 0 if batch.images is None else sum(map(len, batch.images.tiles))
        self._image_tokens += 0 if batch.images is None else int((batch.images.rows_BT >= 0).sum())
        self._sequences += torch.bincount(batch.sources_B, minlength=len(self.sources))
        return batch

    def sequences(self, step: int) -> Callable[[int, int], Batch]:
        """Return a function that returns sequences [start, stop) of the global batch of `step`."""
        phase = self.phase(step)
        loader = self.loaders[phase.name]
        if self.window is None:
            return partial(loader.batch, step - phase.start)
        rows = self.ordinals(step)
        return lambda start, stop: loader.samples(rows[start:stop], step - phase.start)

    def ordinals(self, step: int) -> Sequence[int]:
        """Return the ordinals of the samples of `step`, in the order of its phase."""
        phase = self.phase(step)
        begin = (step - (phase.start if self.window is None else self.window.first_step)) * phase.global_batch_size
        rows = range(begin, begin + phase.global_batch_size)
        return rows if self.window is None else self.window.rows[rows.start : rows.stop]

    def read(self, device: torch.device) -> dict[str, Any]:
        """Return metrics of this rank's sequences since the last call. Each rank's sequences are a sample of the same
        blend of sources, so rank 0 logs its own fractions, which needs no collective. Tiles and image tokens are those
        of global batches, summed on `device`.
        """
        total = max(int(self._sequences.sum()), 1)
        counts = zip(self.sources, self._sequences.tolist(), strict=True)
        line: dict[str, Any] = {
            "data_wait_s": round(self.waited_s, 6),
            "labelled_tokens": self._labelled,
            "padding_share": round(self._padding / max(self._positions, 1), 6),
            "source_shares": {name: round(count / total, 4) for name, count in counts},
        }
        positions = self._positions
        if next(iter(self.loaders.values())).corpus.images is not None:
            positions *= self.axis.size
            saw_all = self.meshes.layout.vision.over_data_parallel
            seen = [n * (self.axis.rank == 0 or not saw_all) for n in (self._tiles, self._image_tokens)]
            figures = torch.tensor([*seen, *self._squares.values()], device=device)
            self.axis.sum(figures, "metrics")
            tiles, tokens, *squares = figures.tolist()
            self._squares = dict(zip(self._squares, squares, strict=True))
            share = round(tokens / max(positions, 1), 6)
            line |= {"tiles": tiles, "image_tokens": tokens, "image_token_share": share}
        self.lengths = mean_lengths(self._squares, positions)
        self._reset()
        return line

    def close(self) -> None:
        self._prefetcher.close()

    def _make(self, step: int) -> Batch:
        phase = self.phase(step)
        batch = self._sequences_of(step, phase)
        load_tiles(batch.images, self.meshes, phase.micro_batch_size)
        self.prepare(batch, phase.micro_batch_size)
        return batch

    def _sequences_of(self, step: int, phase: Phase) -> Batch:
        size = phase.global_batch_size // self.axis.size
        return local_sequences(self.sequences(step), self.meshes, size, phase.micro_batch_size)

    def _known_until(self, step: int) -> int:
        """Return the first step whose sequences are not known yet: the one after the run or the window."""
        if self.window is None:
            return self.phases[-1].stop
        return self.window.first_step + len(self.window.rows) // self.phase(step).global_batch_size

    def _reset(self) -> None:
        self.waited_s = 0.0
        """Seconds that steps have waited for their batches since the last `read`."""
        self._positions = self._labelled = self._padding = self._tiles = self._image_tokens = 0
        self._squares = dict.fromkeys(self.chunks, 0)
        self._sequences = torch.zeros(len(self.sources), dtype=torch.int64)
