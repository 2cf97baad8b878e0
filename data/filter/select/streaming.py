"""Select from an endless stream, batch by batch, at a keep rate that holds under drift, ties and heavy tails.

Each domain has a threshold key (score, then hash) that is carried from batch to batch and moved no further than the
rate requires. An integral controller sets how much of a batch to keep: the keep rate, plus part of the deficit of all
batches so far. It works on ranks in the batch, so the scale of scores does not matter. Unlike with `select`, the kept
records are the hardest of their batches, not of the whole stream.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.errors import DataError
from data.filter.config import FilterRules, OnError
from data.filter.input.records import Reason
from data.filter.select.selection import (
    CODE,
    NOTHING,
    Codes,
    Integers,
    ShardScores,
    ThresholdKeys,
    score_bits,
    screen,
    second_hash,
)

_STEP = 0.5
"""Fraction of the way by which a batch moves the threshold towards its own quantile. With batches of 512 and 4,096
records and a drift per batch of a fifth of the spread, the deficit after 49 batches is 3% with 0.25 and 0.5% with 0.5.
With 1 the threshold would be the batch's own quantile, without memory.
"""
_REPAID = 0.5
"""Fraction of the deficit that a batch makes up for."""
_TOLERANCE = 0.005
"""Allowed deviation of the total kept, as a fraction of its target. A larger one is corrected at once."""


class StreamSelector:
    """Decide on each batch of a domain from this batch and all batches before. If several ranks decide, all must see
    the same batches.

    `rules` and `noise` are as in `select`; `select.floor` and `select.length_buckets` are ignored. If enough records
    are neither noise nor unscored, the total kept is within half a per cent of its target, plus half of the largest
    document at a threshold so far. Otherwise, later batches make up for the deficit. `revive` keeps records at random
    with a fixed probability, so the fraction of revived records holds on average.
    """

    def __init__(self, domain: str, rules: FilterRules, noise: float | None = None) -> None:
        self.protected = np.array([domain in rules.select.protect])
        self.rate = rules.select.domains.get(domain, rules.keep)
        self.noise, self.revive, self.on_error = noise, rules.select.revive, rules.on_error
        self.seen = self.kept = 0
        """Weight of the records so far, and of those that were kept."""
        self._key = NOTHING  # until the first batch

    def decide(self, batch: ShardScores) -> Codes:
        """Return the reason of each record of the next batch: codes [N], indices into `REASONS`.

        Raises `DataError` for an unscored record with `on_error=fail`.
        """
        unscored = ~np.isfinite(batch.score)
        if self.on_error is OnError.fail and unscored.any():
            fix = "score them again, or set on_error=keep or on_error=drop"
            raise DataError(f"{unscored.sum()} records of {batch.name} have no finite score: {fix}")
        codes = screen(batch, self.protected, self.noise, self.on_error)
        easy, rate, weight, score = codes == CODE[Reason.easy], self.rate, batch.weight, score_bits(batch.score)
        # if records below the threshold are revived with this probability, they are a fraction `revive` of the kept
        probability = self.revive * rate / (1 - (1 - self.revive) * rate) if self.revive else 0.0
        revived = easy & (second_hash(batch.hash) < np.uint64(min(probability, 1.0) * (2**64 - 1025)))
        # revived records are kept regardless of the threshold, so count them before it moves
        given = int(weight[revived | (codes == CODE[Reason.protected])].sum())
        self.seen += int(weight.sum())
        self.kept += given
        competing = easy & ~revived
        if competing.any():
            owed = rate * self.seen - self.kept
            wanted = rate * int(weight.sum()) - given
            asked = wanted + _REPAID * (owed - wanted)
            slack = _TOLERANCE * rate * self.seen
            columns = (score[competing], batch.hash[competing], weight[competing])
            self.kept += self._move(*columns, asked, owed - slack, owed + slack)
        codes[revived] = CODE[Reason.revived]
        codes[easy & self._reached(score, batch.hash)] = CODE[Reason.hard]
        return codes

    def _reached(self, score: Integers, hash_: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return ThresholdKeys((self._key,)).reached(np.zeros(len(score), np.int64), score, hash_)

    def _move(
        self, score: Integers, hash_: NDArray[np.uint64], weight: Integers, asked: float, least: float, most: float
    ) -> int:
        """Move the threshold towards keeping a weight `asked` of these records, clamped to [least, most]. Return the
        weight that is kept. The threshold does not move if no record lies between the old and the new threshold.
        """
        order = np.lexsort((~hash_, -score))
        total = np.concatenate([[0], np.cumsum(weight[order])])
        now = int(self._reached(score, hash_).sum())
        goal = asked if self._key == NOTHING else total[now] + _STEP * (asked - total[now])
        goal = min(max(goal, least), most)
        after = min(int(np.searchsorted(total, goal, "left")), len(order))
        if after and abs(total[after - 1] - goal) < abs(total[after] - goal):
            after -= 1
        if self._key == NOTHING or after != now:
            edge = order[after - 1] if after else order[0]
            self._key = (int(score[edge]) << 64) + int(hash_[edge]) + (not after)
        return int(weight[self._reached(score, hash_)].sum())
