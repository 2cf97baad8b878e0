"""Measure whether scores rise with labels among records of one bucket, such as one domain and similar length.

Records are compared inside buckets only, so that neither the domain nor the length can pass for difficulty. Intervals
are percentile bootstraps (Efron 1979): records are resampled inside buckets, and all scorers share the resamples.

Cross-fitted scores, where each fold is scored by a model of the other folds, are compared inside folds only. Between
folds the AUC is biased downwards: a record's label raises the scores of similar records in other folds, and not its own
(Parker et al. 2007, BMC Bioinformatics 8:326; Forman and Scholz 2010, SIGKDD Explorations 12(1)).

Shapes: N records, n records of a bucket, R resamples; the first row is the sample itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.filter.input.records import LABEL

Numbers = NDArray[np.float64]
Buckets = NDArray[np.int64]
_WEIGHTS_AT_ONCE = 1 << 20

OTHER = "score:"
"""Prefix of the columns with the scores of an ensemble's members and controls."""
FOLD = "fold"
"""`OTHER + FOLD` is the column with the number of the model that scored a record, where scores are cross-fitted."""
NO_SCORES = (OTHER + LABEL, OTHER + FOLD)


@dataclass(frozen=True)
class Estimate:
    """A figure of the sample, its 95% interval, and the figure in each resample."""

    value: float
    low: float
    high: float
    resampled: Numbers

    def minus(self, other: Estimate) -> Estimate:
        """Return the difference, paired by resample."""
        return estimate(np.concatenate([[self.value - other.value], self.resampled - other.resampled]))


def estimate(found: Numbers) -> Estimate:
    """Return an estimate from the figure of the sample, which comes first, and those of the resamples."""
    low, high = np.quantile(found[1:], [0.025, 0.975]) if len(found) > 1 else (np.nan, np.nan)
    return Estimate(float(found[0]), float(low), float(high), found[1:])


def length_buckets(lengths: NDArray[np.int64], count: int) -> Buckets:
    """Return the bucket of each length, among `count` of about equal size. Equal lengths get the same bucket."""
    edges = np.quantile(lengths, np.arange(1, count) / count)
    return np.searchsorted(edges, lengths, side="left")


def auc(
    scores: Mapping[str, Numbers],
    labels: Numbers,
    buckets: Buckets,
    resamples: int = 1000,
    seed: int = 0,
    folds: Buckets | None = None,
) -> dict[str, Estimate]:
    """Return the area under the ROC curve of each scorer: the share of pairs of one bucket with different labels in
    which the record with the higher label has the higher score. A pair with equal scores counts half. A score that is
    not finite ties with every other, so that a scorer gains nothing by leaving records unscored.

    Buckets are pooled by their pairs. With `folds` only pairs of one fold count, and whole buckets are resampled. This
    widens intervals by about as much as they need: the labels of a fold teach the models of the others, so that without
    signal the errors of folds add up to sqrt(2) times those of independent ones. Time grows with the number of distinct
    labels. Raises `ValueError` if no bucket (and fold) has two different labels.
    """
    won, pairs = np.zeros((len(scores), resamples + 1)), np.zeros(resamples + 1)
    for rows, mine, weights in _resampled(buckets, resamples, seed, folds):
        label = labels[mine]
        for level in np.unique(label)[1:]:
            higher, lower = weights * (label == level), weights * (label < level)
            pairs[rows] += higher.sum(1) * lower.sum(1)
            for total, values in zip(won, scores.values(), strict=True):
                total[rows] += np.einsum("rn,rn->r", higher, _below(values[mine], lower))
    if not pairs[0]:
        raise ValueError("no bucket has records of two labels")
    # a resample without pairs tells nothing
    areas = np.divide(won, pairs, out=np.full_like(won, 0.5), where=pairs > 0)
    return dict(zip(scores, map(estimate, areas), strict=True))


def rank_correlation(
    scores: Mapping[str, Numbers],
    labels: Numbers,
    buckets: Buckets,
    resamples: int = 1000,
    seed: int = 0,
    folds: Buckets | None = None,
) -> dict[str, Estimate]:
    """Return the rank correlation (Spearman 1904) of each scorer with the labels inside buckets: of the ranks in the
    bucket (and fold), divided by its size. Ties have their mean rank, and a score that is not finite has the mean rank.
    NaN if scores or labels are constant in every bucket.
    """
    sums = np.zeros((len(scores), 3, resamples + 1))
    for rows, mine, weights in _resampled(buckets, resamples, seed, folds):
        middle, size = weights.sum(1, keepdims=True) / 2, len(mine)
        label = (_below(labels[mine], weights) - middle) / size
        for total, values in zip(sums, scores.values(), strict=True):
            score = (_below(values[mine], weights) - middle) / size
            for row, (one, other) in zip(total, ((score, label), (score, score), (label, label)), strict=True):
                row[rows] += np.einsum("rn,rn,rn->r", weights, one, other)
    covariance, scale = sums[:, 0], np.sqrt(sums[:, 1] * sums[:, 2])
    found = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 1e-12)
    found[scale[:, 0] <= 1e-12, 0] = np.nan
    return dict(zip(scores, map(estimate, found), strict=True))


def spearman(first: Numbers, second: Numbers) -> float | None:
    """Return the rank correlation, with ties at their mean rank; None if either is constant."""
    found = rank_correlation({"": first}, second, np.zeros(len(first), np.int64), 0)[""].value
    return None if np.isnan(found) else found


def _resampled(
    buckets: Buckets, resamples: int, seed: int, folds: Buckets | None
) -> Iterator[tuple[slice, Buckets, Numbers]]:
    """Yield, for each bucket (and fold), a range of rows of the result, the records in it [n], and how often each of
    them is drawn in each of these rows [R, n].
    """
    chance = np.random.default_rng(seed)
    order = np.argsort(buckets, kind="stable")
    for mine in np.split(order, np.flatnonzero(np.diff(buckets[order])) + 1):
        count = len(mine)
        at_once = max(1, _WEIGHTS_AT_ONCE // max(count, 1))
        for begin in range(0, resamples + 1, at_once):
            rows = min(at_once, resamples + 1 - begin)
            drawn = chance.integers(0, max(count, 1), (rows, count)) + np.arange(rows)[:, None] * count
            weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
            if begin == 0:
                weights[0] = 1
            fold = np.zeros(count) if folds is None else folds[mine]
            for one in np.unique(fold):
                yield slice(begin, begin + rows), mine[fold == one], weights[:, fold == one]


def _below(values: Numbers, weights: Numbers) -> Numbers:
    """Return, for each value [n], the weight [R, n] of all lower values, plus half of that of equal ones. A value that
    is not finite equals every other.
    """
    known = np.flatnonzero(np.isfinite(values))
    total = weights.sum(1, keepdims=True)
    found = np.repeat(total / 2, len(values), axis=1)
    if len(known):
        _, place = np.unique(values[known], return_inverse=True)
        order = np.argsort(place, kind="stable")
        starts = np.flatnonzero(np.diff(place[order], prepend=-1))
        equal = np.add.reduceat(weights[:, known[order]], starts, axis=1)
        unknown = total - equal.sum(1, keepdims=True)
        found[:, known] = (np.cumsum(equal, axis=1) - equal / 2 + unknown / 2)[:, place]
    return found


def first_of_each(tables: Iterable[Any], groups: Sequence[str], order: Sequence[tuple[str, str]], count: int) -> Any:
    """Return the first `count` rows of every group of the tables together, of which some may be None. `order`: columns
    to sort by, each with "ascending" or "descending". The result is sorted by group; without `groups` there is one.
    """
    import pyarrow

    table = pyarrow.concat_tables([one for one in tables if one is not None], promote_options="default")
    table = table.sort_by([*((name, "ascending") for name in groups), *order])
    if not groups:
        return table.slice(0, count)
    sizes = table.group_by(groups, use_threads=False).aggregate([([], "count_all")])["count_all"].to_numpy()
    place = np.arange(len(table)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return table.filter(pyarrow.array(place < count))


def rounded(value: float | None) -> float | None:
    """Round to six significant digits, which do not depend on the order of summation. None for NaN and infinity."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")
