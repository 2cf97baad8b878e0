"""Several scorers as one: the mean of a record's ranks under each. Raw scores are never added: one in nats and one in
points would be no more than the one with the larger numbers.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.files import sha256_text
from data.filter.input.records import Record
from data.filter.score.baselines import LengthScorer, RandomScorer
from data.filter.score.scorer import Direction, RemoteScorer, Scorer

_SAMPLE = 4096
"""Records that ranks are taken among: a rank is right within 2.2 points in 100 with 95% confidence over all ranks at
once (Massart 1990: the error exceeds e with probability at most 2 exp(-2 n e^2)).
"""
_BATCH = 256


class EnsembleScorer:
    """Mean rank in [0, 1]. `fit` fits the members, has each score a sample of the data (the records of the lowest
    hashes) and keeps those scores sorted: a record's rank is its place among them, so that it needs no other record.
    Where a member has no number, nor has the ensemble.

    High means hard if it does for all members; else, at best, learnable. Costs `sample` scores more than its members.
    The members' scores are kept with its own, and those of the controls, so that the audit can say how far they agree.
    What a member was not told at first and then was is ranked among the sample as it is then.
    """

    name = "ensemble"

    def __init__(self, members: Sequence[Scorer], sample: int = _SAMPLE) -> None:
        if len(members) < 2:
            raise ConfigError("members", None, "an ensemble needs two scorers or more")
        self.members, self.sample = tuple(members), sample
        self.measures = "mean rank in [0, 1] under " + "; ".join(
            f"{member.name} ({member.measures})" for member in members
        )
        hard = all(member.direction is Direction.hard for member in members)
        self.direction = Direction.hard if hard else Direction.learnable
        self.fingerprint = sha256_text("ensemble", "1", str(sample), *(member.fingerprint for member in members))
        twice = Counter(member.name for member in members)
        self._members = {
            f"{member.name}[{place}]" if twice[member.name] > 1 else member.name: member
            for place, member in enumerate(members)
        }
        controls: tuple[Scorer, ...] = (LengthScorer(), RandomScorer())
        self._controls = {control.name: control for control in controls if control.name not in twice}
        self._sorted: list[NDArray[np.float64]] = []

    @property
    def others(self) -> tuple[str, ...]:
        return (*self._members, *self._controls)

    @property
    def reasons(self) -> Mapping[str, str]:
        """Of the members that ask somebody."""
        asking = {name: member.reasons for name, member in self._members.items() if isinstance(member, RemoteScorer)}
        return {record: f"{name}: {why}" for name, reasons in asking.items() for record, why in reasons.items()}

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        for member in self.members:
            member.fit(records)
        chosen = set(heapq.nsmallest(self.sample, (_hash(record) for record in records())))
        scores: list[list[NDArray[np.float64]]] = [[] for _ in self.members]
        for batch in _batches(record for record in records() if _hash(record) in chosen):
            for member, found in zip(self.members, scores, strict=True):
                found.append(member.score(batch))
        joined = [np.concatenate(found) if found else np.empty(0) for found in scores]
        self._sorted = [np.sort(values[np.isfinite(values)]) for values in joined]

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        return self.score_all(records)[0]

    def score_all(self, records: Sequence[Record]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        if not self._sorted:
            raise ValueError("fit comes before score")
        scores = {name: member.score(records) for name, member in self._members.items()}
        ranks = [_ranks(found, known) for found, known in zip(scores.values(), self._sorted, strict=True)]
        return np.mean(ranks, axis=0), scores | {name: one.score(records) for name, one in self._controls.items()}


def _ranks(scores: NDArray[np.float64], known: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of `known`, which is sorted, below each score, equals by half; not a number where the score is not
    finite or nothing is known.
    """
    if not len(known):
        return np.full(len(scores), np.nan)
    below = np.searchsorted(known, scores, "left") + np.searchsorted(known, scores, "right")
    return np.where(np.isfinite(scores), below / (2 * len(known)), np.nan)


def _hash(record: Record) -> int:
    """Other digits than `fold` reads, so that both folds are in the sample."""
    return int(record.content[8:24], 16)


def _batches(records: Iterable[Record]) -> Iterable[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
