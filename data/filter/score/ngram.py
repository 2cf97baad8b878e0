"""Score by the loss under a byte n-gram model of the data to filter. Takes seconds; needs no weights or tokenizer.

Cross-fitted: the data is split into two folds, and the model fitted to one fold scores only the other. All copies of a
text are in the same fold.
The context is `order - 1` bytes, so the score measures how predictable the wording is, not what the prompt asks for:
improbable text need not be hard. docs/filter.md says what the score is worth on labelled problems. Losses are rounded
to fixed point before they are summed, so a score does not depend on the batch.

A code is an n-gram of up to eight bytes packed into one integer, with the last byte in the lowest bits.
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
from data.filter.score.scorer import FOLDS, Direction, Scorer, fold, hardest_mean, sample_key

MAX_ORDER = 8
_VERSION = "1"
_SAMPLE_BYTES = 1 << 23
_RECORD_BYTES = 1 << 16
"""Maximum bytes of a record in the sample, so that one long document does not fill it."""
_SCORED_AT_ONCE = 1 << 22
"""Characters to score in one batch. Each takes about 60 bytes of memory."""
_FIXED_POINT = 1 << 20
"""Units per nat. The largest loss, about 40 nats, fits 32 bits."""
_UNSEEN = math.log(256)

Codes = NDArray[np.uint64]


class NgramScorer(Scorer):
    """Score by the mean loss in nats per byte of the answer given its prompt, or of a whole plain document. With
    `window`: the mean over the hardest `window` consecutive bytes, or over all bytes of a shorter answer.

    `sample_bytes`: size of the training sample of each fold, which has the records with the lowest hashes. A model
    takes about 12 bytes of memory per distinct n-gram: 20 MB for 8 MB of text, 200 MB for 8 MB of noise.
    """

    direction = Direction.improbable

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
        folds = np.array([fold(record) for record in records], int)
        for side in range(FOLDS):
            model = self._models[(side + 1) % FOLDS]
            places = np.flatnonzero(folds == side)
            ends = np.cumsum([len(records[place].text) for place in places.tolist()])
            for batch in np.split(places, np.flatnonzero(np.diff(ends // _SCORED_AT_ONCE)) + 1):
                scores[batch] = self._score(model, [records[place] for place in batch])
        return scores

    def _score(self, model: NgramModel, records: list[Record]) -> list[float]:
        contexts = [_bytes(record.prompt[-self.order :]) for record in records]
        answers = [_bytes(record.answer) for record in records]
        ends = np.cumsum([len(answer) for answer in answers], dtype=int)
        parts = np.split(model.losses(contexts, answers), ends[:-1])
        return [hardest_mean(losses, self.window) / _FIXED_POINT for losses in parts]


class NgramModel:
    """Interpolated Kneser-Ney over bytes (Ney, Essen and Kneser 1994; Chen and Goodman 1999, section 2.7), with one
    discount for each order.

    At order k, p_k(b | c) = (n(c b) - d) / n(c) + d t(c) / n(c) p_k-1(b | c'), where c' is context c without its oldest
    byte, t(c) is the number of distinct bytes after c, and p_0 = 1/256. At the highest order n counts occurrences; at
    lower orders it counts distinct preceding bytes. d = n_1 / (n_1 + 2 n_2), where n_i is the number of n-grams with
    count i.
    """

    def __init__(self, order: int, texts: Sequence[bytes]) -> None:
        self.order = order
        tables = [np.unique(_codes(order, [b""] * len(texts), texts), return_counts=True)]
        for k in range(order - 1, 0, -1):
            tables.append(np.unique(tables[-1][0] & _mask(k), return_counts=True))
        self._levels: list[_Level] = []
        for distinct, counts in reversed(tables):
            self._levels.append(self._level(distinct, counts))

    def losses(self, contexts: Sequence[bytes], texts: Sequence[bytes]) -> NDArray[np.int64]:
        """Return the fixed-point loss of every byte of the concatenated texts. Each text continues its context."""
        codes = _codes(self.order, contexts, texts)
        distinct, inverse = np.unique(codes, return_inverse=True)
        return self._look_up(distinct)[inverse].astype(np.int64)

    def _level(self, codes: Codes, counts: NDArray[np.int64]) -> _Level:
        """Build the next higher order from its n-grams, their counts and the orders below it."""
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = min(max(once / max(once + 2 * twice, 1), 0.1), 0.9)  # the estimate is unreliable on very little data
        contexts, group, followers = np.unique(codes >> np.uint64(8), return_inverse=True, return_counts=True)
        totals = np.bincount(group, counts)
        backoff = discount * followers / totals
        shorter = np.exp(-self._look_up(codes & _mask(len(self._levels))) / _FIXED_POINT)
        p = (counts - discount) / totals[group] + backoff[group] * shorter
        return _Level(codes, _fixed(p), contexts, _fixed(backoff))

    def _look_up(self, codes: Codes) -> NDArray[np.int32]:
        """Return the fixed-point loss of the last byte of each code. A code has as many bytes as there are levels.

        A level has the interpolated loss of every known n-gram. For any other n-gram, add the weight of its context,
        if the context is known, and look up the n-gram without its oldest byte one level below.
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
    """One order of the model: sorted codes with their losses, and sorted contexts with the -log of their backoff."""

    codes: Codes
    losses: NDArray[np.int32]
    contexts: Codes
    weights: NDArray[np.int32]


class _Sample:
    """Keep the records with the lowest hashes that fit into `size` bytes. The order of arrival does not matter."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._heap: list[tuple[int, bytes]] = []
        self._limit = 1 << 64
        """The lowest hash that was evicted. A record with this hash or a higher one is not added, though it may fit."""

    def add(self, record: Record) -> None:
        key = sample_key(record)
        if key >= self._limit:
            return
        text = _bytes(record.text[:_RECORD_BYTES])[:_RECORD_BYTES]
        heapq.heappush(self._heap, (-key, text))  # negated: heapq pops the smallest
        self._left -= len(text)
        while self._left < 0:
            negative, text = heapq.heappop(self._heap)
            self._limit = -negative
            self._left += len(text)

    def texts(self) -> list[bytes]:
        return [text for _, text in self._heap]


def _bytes(text: str) -> bytes:
    """Encode as UTF-8, with a question mark for each lone surrogate, which a JSON string may contain."""
    return text.encode("utf-8", "replace")


def _mask(k: int) -> np.uint64:
    """Return a mask for the last `k` bytes of a code."""
    return np.uint64((1 << 8 * k) - 1)


def _codes(order: int, contexts: Sequence[bytes], texts: Sequence[bytes]) -> Codes:
    """Return the code that ends at each byte of the concatenated texts. A context shorter than `order - 1` bytes is
    padded with zeros.
    """
    back = order - 1
    parts, is_text = [], []
    for context, text in zip(contexts, texts, strict=True):
        parts += [context[max(0, len(context) - back) :].rjust(back, b"\0"), text]
        is_text += [np.zeros(back, bool), np.ones(len(text), bool)]
    if not parts:
        return np.empty(0, np.uint64)
    joined = np.frombuffer(b"".join(parts), np.uint8)
    codes = joined.astype(np.uint64)
    for distance in range(1, order):  # older bytes are more significant
        codes[distance:] |= joined[:-distance].astype(np.uint64) << np.uint64(8 * distance)
    return codes[np.concatenate(is_text)]


def _find(table: Codes, codes: Codes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the position of each code in the sorted table, and whether the table contains the code."""
    place = np.searchsorted(table, codes)
    if not len(table):
        return place, np.zeros(len(codes), bool)
    return place, table.take(place, mode="clip") == codes


def _fixed(p: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.round(-np.log(p) * _FIXED_POINT).astype(np.int32)
