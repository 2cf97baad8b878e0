"""Score predictions against measurements: errors, balanced accuracy and layout regret."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pair:
    """A predicted and a measured value of the same unit."""

    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Signed relative error: below 0 if the prediction is too low."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class MeasuredLayout:
    """A measured layout in a group of layouts between which a planner chooses."""

    group: str
    predicted_s: float
    tokens_s: float
    """Measured throughput."""


def error_scores(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the median and the mean absolute relative error, and the number of pairs; None without pairs."""
    errors = [abs(pair.error) for pair in pairs]
    if not errors:
        return {"median_error": None, "mean_error": None, "n": 0}
    return {"median_error": statistics.median(errors), "mean_error": statistics.fmean(errors), "n": len(errors)}


def memory_scores(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return `error_scores`, and by how much the lowest prediction is too low (0.05: 5%)."""
    under = max((max(0.0, -pair.error) for pair in pairs), default=None)
    return error_scores(pairs) | {"worst_under": under}


def fit_scores(outcomes: Iterable[tuple[bool, bool]]) -> dict[str, Any]:
    """Return the balanced accuracy of (predicted, measured) outcomes: the mean of the shares that are right among jobs
    that fit and among jobs that do not. None unless there are both.
    """
    outcomes = list(outcomes)
    shares = []
    for truth in (True, False):
        right = [predicted == truth for predicted, measured in outcomes if measured == truth]
        if right:
            shares.append(sum(right) / len(right))
    return {"balanced_accuracy": statistics.fmean(shares) if len(shares) == 2 else None, "n": len(outcomes)}


def regret_scores(trials: Iterable[MeasuredLayout]) -> dict[str, Any]:
    """Return how good the predicted layouts are: the measured throughput of the layout with the lowest predicted time
    over the best measured one, for each group of at least two.
    """
    groups: dict[str, list[MeasuredLayout]] = {}
    for trial in trials:
        groups.setdefault(trial.group, []).append(trial)
    shares = []
    for members in groups.values():
        if len(members) > 1:
            chosen = min(members, key=lambda trial: trial.predicted_s)
            shares.append(chosen.tokens_s / max(trial.tokens_s for trial in members))
    if not shares:
        return {"mean": None, "worst": None, "groups": 0}
    return {"mean": statistics.fmean(shares), "worst": min(shares), "groups": len(shares)}
