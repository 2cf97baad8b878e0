"""Measure how well a scorer separates hard from easy records of similar length.

The measure is the area under the ROC curve over pairs of records in one length bucket: the probability that the record
with the higher label gets the higher score. 0.5 is chance, 1 is perfect, and below 0.5 the order is inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Separation:
    """`area`: area under the ROC curve over all pairs in one bucket with different labels. `low`, `high`: its 95%
    bootstrap interval. `resampled`: the area in each bootstrap resample. Two scorers of the same records get the same
    resamples.
    """

    area: float
    low: float
    high: float
    resampled: Numbers

    def margin_over(self, other: Separation) -> float:
        """Return the lower end of the 95% interval of this area minus the other, paired by resample."""
        return float(np.quantile(self.resampled - other.resampled, 0.025))


def length_buckets(lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the bucket of each length, among `count` of about equal size. Equal lengths get the same bucket."""
    edges = np.quantile(lengths, np.arange(1, count) / count)
    return np.searchsorted(edges, lengths, side="left")


def separation(
    scores: Numbers, labels: Numbers, buckets: NDArray[np.int64], resamples: int = 1000, seed: int = 0
) -> Separation:
    """Return the area under the ROC curve inside buckets. A pair with equal scores counts half. A score that is not
    finite ties with every other score, so that a scorer gains nothing by leaving records unscored.

    The interval is the percentile bootstrap (Efron 1979) over records. A pair's weight is the product of the
    numbers of times that its two records were drawn. Memory grows with the square of the bucket size. Raises
    `ValueError` if no bucket has two different labels.
    """
    count = len(scores)
    chance = np.random.default_rng(seed)
    at_once = max(1, _WEIGHTS_AT_ONCE // max(count, 1))
    inside = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
    tables = [_pairs(scores[mine], labels[mine]) for mine in inside]
    right, pairs = np.zeros(resamples + 1), np.zeros(resamples + 1)
    for begin in range(0, resamples + 1, at_once):
        rows = min(at_once, resamples + 1 - begin)
        weights = chance.multinomial(count, np.full(count, 1 / count), rows).astype(np.float32)
        if begin == 0:
            weights[0] = 1  # the sample itself, not a resample
        for mine, table in zip(inside, tables, strict=True):
            part = weights[:, mine]
            won, counted = np.split(part @ table, 2, axis=1)
            right[begin : begin + rows] += np.einsum("rn,rn->r", won, part, dtype=np.float64)
            pairs[begin : begin + rows] += np.einsum("rn,rn->r", counted, part, dtype=np.float64)
    if not pairs.all():
        raise ValueError("no length bucket has records of two labels")
    areas = right / pairs
    low, high = np.quantile(areas[1:], [0.025, 0.975])
    return Separation(float(areas[0]), float(low), float(high), areas[1:])


def _pairs(scores: Numbers, labels: Numbers) -> NDArray[np.float32]:
    """Return two tables [n, n] over pairs of records, side by side as [n, 2n]. The second is 1 if the first record of
    the pair has the higher label; only these pairs count. The first is 1 if that record also has the higher score, 0.5
    if the scores tie, and else 0.
    """
    counted = labels[:, None] > labels[None, :]
    known = np.isfinite(scores)
    usable = np.where(known, scores, 0.0)
    ahead = np.sign(usable[:, None] - usable[None, :])
    ahead[~known] = 0
    ahead[:, ~known] = 0
    return np.concatenate([counted * (ahead + 1) / 2, counted], axis=1).astype(np.float32)
