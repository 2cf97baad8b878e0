"""Define the interface of scorers, and functions that several scorers use.

Scores are cached under the scorer's fingerprint. A record with a cached score is never scored again: a model's score
depends on the other texts of the batch, so it could change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from data.filter.input.records import Record


class Direction(Enum):
    """The meaning of a high score."""

    hard = "hard"
    """Hard according to labels, a judge or a verifier."""
    improbable = "improbable"
    """Improbable to a model. This alone does not show difficulty (docs/filter.md)."""
    learnable = "learnable"
    """Learnable and not yet learnt; such text is often easier than the rest."""
    quality = "quality"
    """Better by a judge's rubric, from which more can be learnt; it may be easy."""
    control = "control"
    """Nothing: the scorer is a control."""
    mixed = "mixed"
    """An ensemble whose members disagree on the meaning."""


class Scorer(Protocol):
    name: str
    measures: str
    """What a score measures, in one line for people, with the unit."""
    direction: Direction
    fingerprint: str
    """A hash of everything on which a score depends (weights, tokenizer, template, settings), except the record itself
    and the data from which `fit` learns.
    """

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        """Learn from the records that will be scored. Every rank passes the same records in the same order.

        Fit one model per half of the data (`fold`) and score each half with the model of the other: no record may be
        scored by a model that learnt from it. The default does nothing.
        """
        return

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        """Return one number per record; NaN or infinite for a record without a score."""
        ...


@runtime_checkable
class RemoteScorer(Protocol):
    """A scorer that depends on a server, which may fail for some records. The next run scores these records again."""

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why a record has no score, by record id."""
        ...


@runtime_checkable
class CostlyScorer(Protocol):
    """A scorer whose cost is said before it starts."""

    def cost(self, records: Callable[[], Iterable[Record]]) -> str:
        """Describe in one line what scoring these records costs; "" if nothing."""
        ...


@runtime_checkable
class CompositeScorer(Protocol):
    """A scorer that has other scorers, such as members. Their scores are stored as well."""

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the other scorers, without duplicates."""
        ...

    def score_all(self, records: Sequence[Record]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """Return the result of `score`, and the scores of each of the other scorers by name."""
        ...


@runtime_checkable
class StoredScorer(Protocol):
    """A scorer whose `fit` stores what it learned, so that one process fits it and the others read that."""

    directory: Path
    report: Callable[[str], None]


def stored_parts(scorer: Scorer) -> list[StoredScorer]:
    """Return the scorer, or those of its members, that store what they learned."""
    return [one for one in getattr(scorer, "members", (scorer,)) if isinstance(one, StoredScorer)]


TokenLosses = Callable[[Sequence[tuple[str, str]]], list[NDArray[np.float32]]]
"""Returns, for each pair of texts, the loss in nats of each token of the second text given the first text, which may be
empty. Scorers receive models in this form, so that `data` need not import the models' code.
"""

TextFeatures = Callable[[Sequence[tuple[str, str]]], tuple[NDArray[np.float32], int]]
"""Returns features [N, S] of N pairs of prompt and answer, and the number of pairs that were cut to the model's
context. The features of a pair do not depend on the other pairs, to the bit. Those of an empty text are zeros.
"""

FOLDS = 2


def fold(record: Record) -> int:
    """Return the half of the data to which a record belongs. It depends on the text, so duplicates are in one fold."""
    return int(record.content[:8], 16) % FOLDS


def sample_key(record: Record) -> int:
    """Return a 64-bit hash of the text for sampling. `fold` uses other digits of it, so a sample has both folds."""
    return key_of_content(record.content)


def key_of_content(content: str) -> int:
    """Return the `sample_key` of a record with this `Record.content`, which is a hash that takes time."""
    return int(content[8:24], 16)


def hardest_mean(losses: NDArray[Any], window: int | None = None) -> float:
    """Return the largest mean over `window` consecutive losses; the mean of all if there are fewer or `window` is None.
    NaN without losses. Sums of integers are exact up to 2^53.
    """
    if not len(losses):
        return np.nan
    if window is None or window >= len(losses):
        return float(losses.mean(dtype=np.float64))
    sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    return float((sums[window:] - sums[:-window]).max() / window)
