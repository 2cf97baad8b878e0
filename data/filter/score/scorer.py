"""What a scorer is. Scores are cached under its fingerprint, and the cache is the authority: a score is never taken
twice, because a model's depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from data.filter.input.records import Record


class Direction(Enum):
    """What a high score means."""

    hard = "hard"
    learnable = "learnable"
    """Worth learning and not yet learnt; often easier than the rest."""


class Scorer(Protocol):
    name: str
    measures: str
    """One line for people, with the unit."""
    direction: Direction
    fingerprint: str
    """A hash of weights, tokenizer, template and settings: of all that a score depends on but the record and, where
    `fit` is used, the data fitted to.
    """

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        """Learn from the very records to be scored, where the scorer does; every rank calls it with the same ones in
        the same order. Cross-fitting: no record may be scored by what learnt from it (`fold`).
        """
        ...

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        """One number per record, not finite where there is none to be had."""
        ...


@runtime_checkable
class RemoteScorer(Protocol):
    """A scorer that asks somebody, who may give no answer to some records: the next run asks again for those."""

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why a record has no score, by its id."""
        ...


@runtime_checkable
class CompositeScorer(Protocol):
    """A scorer that asks others, whose scores are kept beside its own."""

    @property
    def others(self) -> tuple[str, ...]:
        """Their names, each once."""
        ...

    def score_all(self, records: Sequence[Record]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """What `score` gives, and what each of the others does."""
        ...


TokenLosses = Callable[[Sequence[tuple[str, str]]], list[NDArray[np.float32]]]
"""Loss in nats of every token of the second text given the first, for pairs of texts; the first may be empty. A model
is handed to scorers in this form: `data` knows of no models.
"""

FOLDS = 2


def fold(record: Record) -> int:
    """Which half of the data a record is in, by its text: copies are on the same side."""
    return int(record.content[:8], 16) % FOLDS
