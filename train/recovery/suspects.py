"""Find the documents that may be to blame: sequences with an unusual loss, and the documents in them.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from itertools import pairwise
from statistics import median, median_low
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.corpus import DOCUMENTS, TRAIN, Corpus
from data.loader import IGNORED, Batch
from data.sampling import Exclusion
from data.tokens import TokenStream
from parallel.parallelize import ParallelModel
from train.callbacks.base import TrainingRun
from train.eval.held_out import sequence_losses
from train.recovery.config import RecoveryConfig
from train.recovery.detector import LEAST_SPREAD, NORMAL_MAD

LONGEST = 1 << 20
"""Tokens within which the ends of a document are looked for. A longer one is excluded in parts."""
SHOWN = 64
"""Most documents of a sequence whose losses are measured."""


@dataclass(frozen=True)
class Suspect:
    """Tokens [start, stop) of a source that `step` (from 0) read in sequence `index` of its batch: a document or, if
    none of its documents stands out, the whole sequence. `loss` in nats per token.
    """

    source: str
    start: int
    stop: int
    step: int
    index: int
    loss: float
    name: str | None = None

    def excluded_from(self, step: int) -> Exclusion:
        return Exclusion(self.source, self.start, self.stop, step)

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON values: a loss of NaN as text."""
        return asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else str(self.loss)}


@dataclass(frozen=True, eq=False)
class StepSequences:
    """The sequences of the global batch of `step`, as `Loader.locate` names them. `losses`: before the step."""

    step: int
    sources: NDArray[np.int64]
    sequences: NDArray[np.int64]
    losses: list[float]

    @classmethod
    def of(cls, run: TrainingRun, step: int) -> StepSequences:
        """Return the sequences of the next step, with their losses under the present weights."""
        phase, ordinals = run.phase(step), np.asarray(run.batches.ordinals(step), np.int64)
        steps = np.full(len(ordinals), step - phase.start)
        found = cls(step, *run.loaders[phase.name].locate(ordinals, steps), [])
        found.losses.extend(found.measure(run))
        return found

    def batch(self, run: TrainingRun, start: int, stop: int) -> Batch:
        """Return sequences [start, stop)."""
        return run.loaders[run.phase(self.step).name].read(self.sources[start:stop], self.sequences[start:stop])

    def measure(self, run: TrainingRun) -> list[float]:
        """Return the loss of each sequence under the present weights, on every rank: 0 for one without labels. Empty
        for a contrastive run, whose loss is one of pairs, not of sequences.
        """
        placed, size = run.engine.placed, run.phase(self.step).micro_batch_size
        if not isinstance(placed, ParallelModel):
            return []
        losses = sequence_losses(placed, partial(self.batch, run), len(self.sequences), size).tolist()
        return [0.0 if math.isnan(x) and not _labelled(self.batch(run, i, i + 1)) else x for i, x in enumerate(losses)]


def outliers(losses: Mapping[int, Sequence[float]], config: RecoveryConfig) -> list[tuple[int, int]]:
    """Return (step, index) of the sequences whose loss stands out from the others of their step, worst first.

    The spread is that of all steps: batches may be small. A step at which most losses are not finite has no outliers,
    because there the model is at fault.
    """
    middles, rest = {}, []
    for step, values in losses.items():
        finite = [value for value in values if math.isfinite(value)]
        if 2 * len(finite) > len(values):
            middles[step] = median(finite)
            rest += [value - middles[step] for value in finite]
    if not rest:
        return []
    center = median(rest)
    spread = NORMAL_MAD * median(abs(value - center) for value in rest)
    found = []
    for step, middle in middles.items():
        limit = max(middle + config.deviations * max(spread, LEAST_SPREAD * middle), config.loss_ratio * middle)
        found += [(step, i, value - middle) for i, value in enumerate(losses[step]) if not value <= limit]
    found.sort(key=lambda one: -one[2] if math.isfinite(one[2]) else -math.inf)
    return [(step, i) for step, i, _ in found]


def whole_sequence(run: TrainingRun, found: StepSequences, index: int) -> Suspect:
    """Return a sequence as a suspect."""
    phase, loss = run.phase(found.step), found.losses[index] if found.losses else 0.0
    source = run.loaders[phase.name].blend.names[found.sources[index]]
    start = int(found.sequences[index]) * phase.seq_len
    return Suspect(source, start, start + phase.seq_len, found.step, index, loss)


def documents(run: TrainingRun, found: StepSequences, index: int) -> list[Suspect]:
    """Return the documents of a sequence whose losses stand out under the present weights, or else the sequence."""
    whole, placed = whole_sequence(run, found, index), run.engine.placed
    spans = list(_spans(run.corpus.stream(whole.source, TRAIN), run.corpus.tokenizer.bos_id, whole.start, whole.stop))
    if len(spans) > SHOWN or not isinstance(placed, ParallelModel):
        return [whole]

    def only(first: int, last: int) -> Batch:
        """Return the sequence once for each of these documents, with the labels of that document alone."""
        copies = [found.batch(run, index, index + 1) for _ in spans[first:last]]
        for copy, (start, stop) in zip(copies, spans[first:last], strict=True):
            labels_BT = torch.full_like(copy.labels_BT, IGNORED)
            here = slice(max(start - whole.start, 0), max(stop - 1 - whole.start, 0))
            labels_BT[:, here] = copy.labels_BT[:, here]
            copy.labels_BT = labels_BT
        return reduce(Batch.concat, copies)

    losses = sequence_losses(placed, only, len(spans), run.phase(found.step).micro_batch_size).tolist()
    wrong = [i for i, one in enumerate(losses) if not math.isfinite(one) and _labelled(only(i, i + 1))]
    if not wrong:
        finite, ratio = [one for one in losses if math.isfinite(one)], run.config.recovery.loss_ratio
        if len(finite) > 1:
            wrong = [i for i, one in enumerate(losses) if one > ratio * median_low(sorted(finite)[:-1])]
    if not wrong:
        return [whole]
    at = found.step, index
    names = {i: _name(run.corpus, whole.source, *spans[i]) for i in wrong}
    return [Suspect(whole.source, *spans[i], *at, losses[i], names[i]) for i in wrong]


def _labelled(batch: Batch) -> bool:
    return bool((batch.labels_BT != IGNORED).any())


def _spans(stream: TokenStream, bos: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield [begin, end) of each document with tokens in [start, stop), padding included."""
    begin = max(0, start - LONGEST)
    end = min(len(stream), stop + LONGEST)
    tokens = stream.window(begin, end - begin)
    edges = [begin + int(place) for place in np.flatnonzero(tokens == bos)]
    edges = sorted({begin, *edges, end})
    for one, after in pairwise(edges):
        if one < stop and after > start:
            yield one, after


def _name(corpus: Corpus, source: str, start: int, stop: int) -> str | None:
    """Return the name of the document in these tokens, if its source has names."""
    path = corpus.directory / f"{source}{DOCUMENTS}"
    if not path.exists():
        return None
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path, filters=[("start", ">=", start), ("start", "<", stop)]).to_pylist()
    return rows[0]["name"] if rows else None
