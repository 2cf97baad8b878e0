"""Loss under a byte n-gram model of the very data that is filtered: seconds, no weights, no tokenizer.

Cross-fitted: each record is scored by the model of the other fold, which has not seen it nor its copies. What it trades
away: it looks back no further than `order - 1` bytes, so it hears how predictable the wording is and nothing of what
the prompt asks for. Losses are rounded to fixed point before they are summed: a score is the same whatever else is in
the batch.

A code is a run of up to eight bytes as one integer, the last byte lowest.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.files import sha256_text
from data.filter.input.records import Record
from data.filter.score.scorer import FOLDS, Direction, fold

MAX_ORDER = 8
_VERSION = "1"
_SAMPLE_BYTES = 1 << 23
_RECORD_BYTES = 1 << 16
"""No record gives more than its first so many bytes to the sample, so that one long document does not fill it."""
_SCORED_AT_ONCE = 1 << 22
"""Bytes: bounds memory at about 60 times that."""
_FIXED_POINT = 1 << 20
"""Units of a nat; the largest loss, some 40 nats, fits 32 bits."""
_UNSEEN = math.log(256)

Codes = NDArray[np.uint64]


class NgramScorer:
    """Mean loss in nats per byte of the answer given what comes before it (of all of a plain document); with `window`,
    the mean over the hardest so many bytes in a row, or over all where there are fewer.

    `sample_bytes`: how much of each fold is learnt from: the records of the lowest hashes. A model takes about 12 bytes
    for each different run of bytes: some 20 MB for 8 MB of text, 200 MB for 8 MB of noise.

    Mean loss goes with difficulty among answers of one length that show their work, since one of more steps has more
    figures and less wording between them. Where an answer is its last number alone, nothing of the steps is in it and
    this scorer cannot tell them (docs/filter_difficulty.png).
    """

    direction = Direction.hard

    def __init__(self, order: int = 5, window: int | None = None, sample_bytes: int = _SAMPLE_BYTES) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ConfigError("order", order, f"must lie in [1, {MAX_ORDER}]", [5])
        self.order, self.window, self.sample_bytes = order, window, sample_bytes
        part = f"the hardest {window} bytes" if window else "all bytes"
        self.name = "ngram"
        self.measures = f"nats per byte, mean over {part} of the answer, byte {order}-gram model of the other fold"
        self.fingerprint = sha256_text("ngram", _VERSION, str(order), str(window), str(sample_bytes))
        self._models: list[NgramModel] = []

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        samples = [_Sample(self.sample_bytes) for _ in range(FOLDS)]
        for record in records():
            samples[fold(record)].add(record)
        self._models = [NgramModel(self.order, sample.texts()) for sample in samples]

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        if not self._models:
            raise ValueError("fit comes before score")
        scores = np.full(len(records), np.nan)
        folds = [fold(record) for record in records]
        for side in range(FOLDS):
            model = self._models[(side + 1) % FOLDS]
            mine = [number for number, found in enumerate(folds) if found == side]
            for numbers in _batches(records, mine):
                scores[numbers] = self._score(model, [records[number] for number in numbers])
        return scores

    def _score(self, model: NgramModel, records: list[Record]) -> list[float]:
        contexts = [_bytes(record.prompt[-self.order :]) for record in records]
        answers = [_bytes(record.answer) for record in records]
        losses = model.losses(contexts, answers)
        ends = np.cumsum([len(answer) for answer in answers])
        return [
            hardest_mean(losses[end - len(answer) : end], self.window) / _FIXED_POINT
            for answer, end in zip(answers, ends, strict=True)
        ]


def hardest_mean(losses: NDArray[np.int64], window: int | None) -> float:
    """The largest mean over `window` values in a row, or the mean of all where there are fewer or `window` is null; not
    a number where there is no value.
    """
    if not len(losses):
        return math.nan
    if window is None or window >= len(losses):
        return int(losses.sum()) / len(losses)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(losses)])
    return int((sums[window:] - sums[:-window]).max()) / window


class NgramModel:
    """Interpolated Kneser-Ney of bytes (Ney, Essen and Kneser 1994; Chen and Goodman 1999, section 2.7), with one
    discount for each order.

    p_k(b | c) = (n(c b) - d) / n(c) + d t(c) / n(c) p_k-1(b | c'), where c' is c without its oldest byte, t(c) the
    number of different bytes after c, and p_0 = 1/256. n counts occurrences at the highest order and, below it,
    different bytes before. d = n_1 / (n_1 + 2 n_2), from how many n-grams are counted once and twice.
    """

    def __init__(self, order: int, texts: Sequence[bytes]) -> None:
        self.order = order
        codes = _codes(order, [b""] * len(texts), texts)
        codes.sort()
        distinct, counts = _runs(codes)
        tables = []
        for k in range(order, 0, -1):
            tables.append((distinct, counts))
            shorter = distinct & _mask(k - 1)
            shorter.sort()
            distinct, counts = _runs(shorter)
        self._levels: list[_Level] = []
        for distinct, counts in reversed(tables):
            self._levels.append(self._level(distinct, counts))

    def losses(self, contexts: Sequence[bytes], texts: Sequence[bytes]) -> NDArray[np.int64]:
        """Fixed-point loss of every byte of every text, one after the other, each text begun after its context."""
        codes = _codes(self.order, contexts, texts)
        distinct, inverse = np.unique(codes, return_inverse=True)
        return self._look_up(distinct)[inverse].astype(np.int64)

    def _level(self, codes: Codes, counts: NDArray[np.int64]) -> _Level:
        """The next order up, from its n-grams and the orders below it."""
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = min(max(once / max(once + 2 * twice, 1), 0.1), 0.9)  # tiny or exhausted data has no estimate
        contexts = codes >> np.uint64(8)
        starts = np.flatnonzero(np.concatenate([np.ones(min(len(codes), 1), bool), contexts[1:] != contexts[:-1]]))
        followers = np.diff(np.append(starts, len(codes)))
        totals = np.add.reduceat(counts, starts) if len(starts) else counts
        backoff = discount * followers / totals
        shorter = np.exp(-self._look_up(codes & _mask(len(self._levels))) / _FIXED_POINT)
        group = np.repeat(np.arange(len(starts)), followers)
        p = (counts - discount) / totals[group] + backoff[group] * shorter
        return _Level(codes, _fixed(p), contexts[starts], _fixed(backoff))

    def _look_up(self, codes: Codes) -> NDArray[np.int32]:
        """Fixed-point loss of the last byte of each code of as many bytes as there are levels.

        A known n-gram has its interpolated loss in the table. For any other only the lower order's share is left: the
        context's weight, if the context is known, and the loss without the oldest byte.
        """
        losses = np.zeros(len(codes), np.int32)
        left = np.arange(len(codes))
        for k in range(len(self._levels), 0, -1):
            level = self._levels[k - 1]
            place, known = _find(level.codes, codes)
            losses[left[known]] += level.losses[place[known]]
            codes, left = codes[~known], left[~known]
            place, known = _find(level.contexts, codes >> np.uint64(8))
            losses[left[known]] += level.weights[place[known]]
            codes = codes & _mask(k - 1)
        losses[left] += np.int32(round(_UNSEEN * _FIXED_POINT))
        return losses


@dataclass(frozen=True)
class _Level:
    """One order: sorted codes with their losses, sorted contexts with minus the log of the lower order's weight."""

    codes: Codes
    losses: NDArray[np.int32]
    contexts: Codes
    weights: NDArray[np.int32]


class _Sample:
    """The records of the lowest hashes that fit into `size` bytes: the same whatever order they come in."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._heap: list[tuple[int, bytes]] = []
        self._bar = 1 << 64
        """The lowest hash that found no room: none above it is let in, however short."""

    def add(self, record: Record) -> None:
        key = int(record.content[8:24], 16)  # the digits after those that `fold` reads
        if key >= self._bar:
            return
        text = _bytes(record.text[:_RECORD_BYTES])[:_RECORD_BYTES]
        heapq.heappush(self._heap, (-key, text))  # negative: the heap gives its smallest back
        self._left -= len(text)
        while self._left < 0:
            negative, text = heapq.heappop(self._heap)
            self._bar = -negative
            self._left += len(text)

    def texts(self) -> list[bytes]:
        return [text for _, text in self._heap]


def _bytes(text: str) -> bytes:
    """UTF-8; a lone surrogate, which JSON can hold, becomes a question mark."""
    return text.encode("utf-8", "replace")


def _mask(k: int) -> np.uint64:
    """Of the last `k` bytes of a code."""
    return np.uint64((1 << 8 * k) - 1)


def _codes(order: int, contexts: Sequence[bytes], texts: Sequence[bytes]) -> Codes:
    """The code that ends in each byte of the texts, one text after the other. Where a context is shorter than
    `order - 1` bytes, zeros come before it.
    """
    back = order - 1
    pieces, is_text = [], []
    for context, text in zip(contexts, texts, strict=True):
        pieces += [context[max(0, len(context) - back) :].rjust(back, b"\0"), text]
        is_text += [np.zeros(back, bool), np.ones(len(text), bool)]
    if not pieces:
        return np.empty(0, np.uint64)
    joined = np.frombuffer(b"".join(pieces), np.uint8)
    codes = joined.astype(np.uint64)
    for distance in range(1, order):  # an older byte is a higher one
        codes[distance:] |= joined[:-distance].astype(np.uint64) << np.uint64(8 * distance)
    return codes[np.concatenate(is_text)]


def _runs(codes: Codes) -> tuple[Codes, NDArray[np.int64]]:
    """Different values of a sorted array and how often each occurs."""
    starts = np.flatnonzero(np.concatenate([np.ones(min(len(codes), 1), bool), codes[1:] != codes[:-1]]))
    return codes[starts], np.diff(np.append(starts, len(codes)))


def _find(table: Codes, codes: Codes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where each code is in the sorted table, and whether it is there."""
    place = np.searchsorted(table, codes)
    if not len(table):
        return place, np.zeros(len(codes), bool)
    place[place == len(table)] = 0
    return place, table[place] == codes


def _fixed(p: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.round(-np.log(p) * _FIXED_POINT).astype(np.int32)


def _batches(records: Sequence[Record], numbers: list[int]) -> Iterable[list[int]]:
    batch: list[int] = []
    size = 0
    for number in numbers:
        batch.append(number)
        size += len(records[number].text)
        if size >= _SCORED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
