"""How well a scorer separates hard from easy records of the same length.

The measure is the probability that of two records of about the same length, the one with the higher label scores higher
(the area under the ROC curve over pairs inside length buckets): 0.5 is chance, 1 is perfect, below 0.5 is inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Separation:
    """`area`: over all pairs inside buckets whose labels differ; `low`, `high`: its 95% interval over resampled
    records. `resampled`: the area of each resampling; those of two scorers on the same records belong together, one
    by one.
    """

    area: float
    low: float
    high: float
    resampled: Numbers

    def margin_over(self, other: Separation) -> float:
        """The lower end of the 95% interval of this area less the other's, over the same resampled records."""
        return float(np.quantile(self.resampled - other.resampled, 0.025))


def length_buckets(lengths: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Which of `count` buckets each length falls into, about as many records in each; equal lengths are together."""
    edges = np.quantile(lengths, np.arange(1, count) / count)
    return np.searchsorted(edges, lengths, side="left")


def separation(
    scores: Numbers, labels: Numbers, buckets: NDArray[np.int64], resamples: int = 1000, seed: int = 0
) -> Separation:
    """How well scores order labels inside buckets. A tie counts half; a score that is not finite ties with everything,
    so that a scorer gains nothing by not answering.

    The interval is the bootstrap's percentiles (Efron 1979): records are drawn with replacement, and a pair counts as
    often as both of its records were drawn. Memory grows with the square of a bucket. Raises `ValueError` where no
    bucket has two labels.
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
    """For each two of n records, how much of their order the scores have right, and whether the first has the higher
    label, which makes it a pair that counts: [n, 2n].
    """
    counted = labels[:, None] > labels[None, :]
    known = np.isfinite(scores)
    usable = np.where(known, scores, 0.0)
    ahead = np.sign(usable[:, None] - usable[None, :])
    ahead[~known] = 0
    ahead[:, ~known] = 0
    return np.concatenate([counted * (ahead + 1) / 2, counted], axis=1).astype(np.float32)
