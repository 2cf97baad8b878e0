"""Control scorers that ignore difficulty: random and length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.files import sha256_text
from data.filter.input.records import Record
from data.filter.score.scorer import Direction, Scorer
from data.sampling import key_of


class RandomScorer(Scorer):
    """Score a text with a random number in [0, 1) that depends on the seed and the text, not on the id or position."""

    direction = Direction.control
    name = "random"
    measures = "random number in [0, 1)"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.fingerprint = sha256_text("random", "1", str(seed))

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        keys = [key_of("random score", self.seed, one.content) >> 11 for one in records]  # a float64 holds 53 bits
        return np.array(keys, np.float64) / (1 << 53)


class LengthScorer(Scorer):
    """Score by the bytes of the answer. Long answers are harder in most data sets, so a score that grows with length
    looks good until records of the same length are compared.
    """

    direction = Direction.control
    name = "length"
    measures = "bytes of the answer"
    fingerprint = sha256_text("length", "1")

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        return np.array([len(record.answer.encode("utf-8", "replace")) for record in records], np.float64)
