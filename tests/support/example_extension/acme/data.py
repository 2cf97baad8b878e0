"""A source and a scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data.filter.input.records import Record
from data.filter.score.scorer import Direction


class Counting:
    """A source of documents that count upwards."""

    def __init__(self, documents: int = 100) -> None:
        self.count = documents

    def documents(self) -> Iterator[str]:
        for first in range(self.count):
            yield " ".join(str(number) for number in range(first, first + 200))

    def fingerprint(self) -> str:
        return f"counting 1 {self.count}"


class Sevens:
    """A scorer: the larger the fraction of characters that are a 7, the harder the text."""

    name = "sevens"
    measures = "share of characters that are a 7"
    direction = Direction.hard
    fingerprint = "sevens 1"

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        return

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        return np.array([record.text.count("7") / max(len(record.text), 1) for record in records])
