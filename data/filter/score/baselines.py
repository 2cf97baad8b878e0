"""Scorers that know nothing of difficulty: what any other must beat, and what a filter is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from core.files import sha256_text
from data.filter.input.records import Record
from data.filter.score.scorer import Direction
from data.sampling import key_of


class RandomScorer:
    """A lot in [0, 1) for each text: the same wherever it stands and whatever it is called."""

    direction = Direction.hard
    name = "random"
    measures = "a lot in [0, 1)"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.fingerprint = sha256_text("random", "1", str(seed))

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        """There is nothing to learn."""

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        keys = [
            key_of("random score", self.seed, record.content) >> 11 for record in records
        ]  # a float64 holds 53 bits
        return np.array(keys, np.float64) / (1 << 53)


class LengthScorer:
    """Bytes of the answer. Long answers are harder on most sets, which is why a score that grows with length looks good
    until records of one length are compared.
    """

    direction = Direction.hard
    name = "length"
    measures = "bytes of the answer"
    fingerprint = sha256_text("length", "1")

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        """There is nothing to learn."""

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        return np.array([len(record.answer.encode("utf-8", "replace")) for record in records], np.float64)
