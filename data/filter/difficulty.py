"""Whether a scorer tells hard from easy, and not merely long from short.

What is measured is the chance that of two records of about the same length, the one of the higher label scores higher
(the area under the ROC curve over pairs inside length buckets): 0.5 is a lot, 1 is perfect, below 0.5 is upside down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_RESAMPLED_AT_ONCE = 100


@dataclass(frozen=True)
class Separation:
    """`area`: over all pairs inside buckets whose labels differ; `low`, `high`: its 95% interval over resampled records.
    `resampled`: the area of each resampling; those of two scorers on the same records belong together, pair by pair.
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
    """How well scores order labels inside buckets. A tie counts half; scores that are no numbers count as ties with
    everything, so that a scorer gains nothing by not answering.

    The interval is the bootstrap's percentiles (Efron 1979): records are drawn anew with replacement, and a pair counts
    as often as both of its records were drawn. Raises `ValueError` where no bucket has two labels.
    """
    count = len(scores)
    chance = np.random.default_rng(seed)
    right, pairs = np.zeros(resamples + 1), np.zeros(resamples + 1)
    for begin in range(0, resamples + 1, _RESAMPLED_AT_ONCE):
        rows = min(_RESAMPLED_AT_ONCE, resamples + 1 - begin)
        weights = chance.multinomial(count, np.full(count, 1 / count), rows).astype(np.float32)
        if begin == 0:
            weights[0] = 1  # the records as they are
        for bucket in np.unique(buckets):
            mine = buckets == bucket
            won, counted = _pairs(scores[mine], labels[mine])
            part = weights[:, mine]
            right[begin : begin + rows] += np.einsum("rn,rn->r", part @ won, part, dtype=np.float64)
            pairs[begin : begin + rows] += np.einsum("rn,rn->r", part @ counted, part, dtype=np.float64)
    if not pairs.all():
        raise ValueError("no length bucket has records of two labels")
    areas = right / pairs
    low, high = np.quantile(areas[1:], [0.025, 0.975])
    return Separation(float(areas[0]), float(low), float(high), areas[1:])


def _pairs(scores: Numbers, labels: Numbers) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For each two records, whether the first has the higher label, and how much of that its score has right."""
    counted = (labels[:, None] > labels[None, :]).astype(np.float32)
    known = np.isfinite(scores)
    ahead = np.sign(np.subtract.outer(np.where(known, scores, 0.0), np.where(known, scores, 0.0)))
    ahead[~known] = 0
    ahead[:, ~known] = 0
    return counted * (ahead + 1).astype(np.float32) / 2, counted
