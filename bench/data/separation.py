"""Measure how well a scorer separates hard from easy records of similar length.

The measure is the area under the ROC curve over pairs inside length buckets: the probability that the record with the
higher label gets the higher score. 0.5 is chance, 1 is perfect, below 0.5 is inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Separation:
    """`area`: over all pairs inside buckets whose labels differ. `low`, `high`: its 95% bootstrap interval.
    `resampled`: the area of each resample; two scorers of the same records are resampled alike.
    """

    area: float
    low: float
    high: float
    resampled: Numbers

    def margin_over(self, other: Separation) -> float:
        """Return the lower end of the 95% interval of this area minus the other, paired by resample."""
        return float(np.quantile(self.resampled - other.resampled, 0.025))


def length_buckets(lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return each length's bucket, of `count` buckets of about equal size. Equal lengths share a bucket."""
    edges = np.quantile(lengths, np.arange(1, count) / count)
    return np.searchsorted(edges, lengths, side="left")


def separation(
    scores: Numbers, labels: Numbers, buckets: NDArray[np.int64], resamples: int = 1000, seed: int = 0
) -> Separation:
    """Return the area under the ROC curve inside buckets. A tie counts half. A score that is not finite ties with
    all, so that a scorer gains nothing by not answering.

    The interval is the percentile bootstrap (Efron 1979) over records; a pair's weight is the product of its records'
    counts. Memory grows with the square of a bucket. Raises `ValueError` if no bucket has two labels.
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
            weights[0] = 1  # the records as they are
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
    """Return [n, 2n]: how far the scores order each pair correctly (0, 0.5, 1), and whether the pair counts because the
    first record has the higher label.
    """
    counted = labels[:, None] > labels[None, :]
    known = np.isfinite(scores)
    usable = np.where(known, scores, 0.0)
    ahead = np.sign(usable[:, None] - usable[None, :])
    ahead[~known] = 0
    ahead[:, ~known] = 0
    return np.concatenate([counted * (ahead + 1) / 2, counted], axis=1).astype(np.float32)
