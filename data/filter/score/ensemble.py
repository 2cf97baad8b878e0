"""Combine several scorers by the mean of a record's ranks under each. Raw scores are never averaged, because the scorer
with the largest numbers would dominate.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from core.files import sha256_text
from data.filter.input.records import Record
from data.filter.score.baselines import LengthScorer, RandomScorer
from data.filter.score.scorer import CompositeScorer, CostlyScorer, Direction, RemoteScorer, Scorer, sample_key

_SAMPLE = 4096
"""Number n of records among which a record is ranked. With 95% confidence all ranks are accurate to 2.2 percentage
points (Massart 1990: the error of a rank exceeds e with probability at most 2 exp(-2 n e^2)).
"""
_BATCH = 256


class EnsembleScorer(Scorer):
    """Score by the mean rank in [0, 1]. `fit` fits the members and lets each score a sample of the data (the records
    with the lowest hashes). A record is ranked among the scores of the sample only, so its rank does not depend on
    the records scored with it. NaN if a member has no finite score.

    The scores of the members and of the controls (length and random) are stored too, so that the audit can compare
    them, and what members store beside their scores, such as labels. Each member also scores the sample, which is the
    additional cost. If a remote member answers only in a later run, the answer is ranked against the sample as scored
    in that run.
    """

    name = "ensemble"

    def __init__(self, members: Sequence[Scorer], sample: int = _SAMPLE) -> None:
        self.members, self.sample = tuple(members), sample
        self.measures = "mean rank in [0, 1] under " + "; ".join(f"{one.name} ({one.measures})" for one in members)
        self.direction = self._meaning()
        self.fingerprint = sha256_text("ensemble", "1", str(sample), *(member.fingerprint for member in members))
        count = Counter(member.name for member in members)
        self._members = {
            f"{member.name}[{place}]" if count[member.name] > 1 else member.name: member
            for place, member in enumerate(members)
        }
        controls: tuple[Scorer, ...] = (LengthScorer(), RandomScorer())
        self._controls = {control.name: control for control in controls if control.name not in count}
        self._sorted: list[NDArray[np.float64]] = []

    @property
    def others(self) -> tuple[str, ...]:
        of_members = (one.others for one in self.members if isinstance(one, CompositeScorer))
        return tuple(dict.fromkeys([*self._members, *self._controls, *itertools.chain.from_iterable(of_members)]))

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why a remote member has no score for a record, by record id."""
        remote = {name: member.reasons for name, member in self._members.items() if isinstance(member, RemoteScorer)}
        return {record: f"{name}: {why}" for name, reasons in remote.items() for record, why in reasons.items()}

    def cost(self, records: Callable[[], Iterable[Record]]) -> str:
        costs = [member.cost(records) for member in self.members if isinstance(member, CostlyScorer)]
        return "; ".join(filter(None, costs))

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        for member in self.members:
            member.fit(records)
        self.direction = self._meaning()
        chosen = set(heapq.nsmallest(self.sample, map(sample_key, records())))
        sample = (record for record in records() if sample_key(record) in chosen)
        scores: list[list[NDArray[np.float64]]] = [[np.empty(0)] for _ in self.members]
        while batch := list(itertools.islice(sample, _BATCH)):
            for member, found in zip(self.members, scores, strict=True):
                found.append(member.score(batch))
        self._sorted = [np.sort(values[np.isfinite(values)]) for values in map(np.concatenate, scores)]

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        return self.score_all(records)[0]

    def score_all(self, records: Sequence[Record]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        if not self._sorted:
            raise ValueError("fit comes before score")
        scores: dict[str, NDArray[np.float64]] = {}
        others: dict[str, NDArray[np.float64]] = {}
        for name, member in self._members.items():
            if isinstance(member, CompositeScorer):
                scores[name], more = member.score_all(records)
                others = more | others
            else:
                scores[name] = member.score(records)
        ranks = [_ranks(found, sample) for found, sample in zip(scores.values(), self._sorted, strict=True)]
        controls = {name: one.score(records) for name, one in self._controls.items()}
        return np.mean(ranks, axis=0), others | scores | controls

    def _meaning(self) -> Direction:
        meanings = {member.direction for member in self.members}
        return meanings.pop() if len(meanings) == 1 else Direction.mixed


def _ranks(scores: NDArray[np.float64], sample: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return, for each score, the fraction of the sorted `sample` below it; equal values count half. NaN if the score
    is not finite or the sample is empty.
    """
    if not len(sample):
        return np.full(len(scores), np.nan)
    below = np.searchsorted(sample, scores, "left") + np.searchsorted(sample, scores, "right")
    return np.where(np.isfinite(scores), below / (2 * len(sample)), np.nan)
