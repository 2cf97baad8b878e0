"""Selection from an endless stream, batch by batch, at a keep rate that holds under drift, ties and heavy tails.

Each domain has a threshold key (score, then hash) that is carried from batch to batch and moved no further than the
rate requires. An integral controller sets how much of a batch to keep: the keep rate, plus part of the deficit of all
batches so far. It moves in ranks of the batch, not in scores, so it needs no scale. Limitation against `select`: the
kept records are the hardest of their batches, not of the whole stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, DataError
from data.filter.config import FilterRules, OnError
from data.filter.input.records import Reason
from data.filter.select.selection import (
    CODE,
    Codes,
    Integers,
    ShardScores,
    ThresholdKeys,
    check_shard,
    score_bits,
    screen,
    shuffled,
)

_STEP = 0.5
"""How far a batch moves the threshold towards its own quantile. Measured over batches of 512 and 4,096 records with a
drift of a fifth of the spread per batch: at 0.25 the deficit after 49 batches is 3%, at 0.5 half a per cent. At 1 the
threshold is the batch's own quantile, without memory.
"""
_REPAID = 0.5
"""Share of the deficit that a batch makes up for."""
_TOLERANCE = 0.005
"""Allowed deviation of the total, as a share of the target. Beyond it the threshold moves all the way."""


@dataclass
class _Domain:
    """`key`: None before the first batch. `seen`, `kept`: weight so far."""

    key: int | None = None
    seen: int = 0
    kept: int = 0


class StreamSelector:
    """Decides each batch from it and the ones before. If several ranks decide, all must see the same batches.

    `rules` and `noise` are as in `select`. The total kept of each domain is within half a per cent of its rate, or half
    of the largest document at a threshold so far, if enough records are neither noise nor unscored; later batches make
    up for a deficit. There are no length buckets. `floor` raises `ConfigError`. `revive` keeps records at random with a
    fixed probability, so its share holds on average.
    """

    def __init__(self, domains: Sequence[str], rules: FilterRules, noise: float | None = None) -> None:
        check_floor(rules)
        self.domains, self.noise, self.on_error = tuple(domains), noise, rules.on_error
        self.protected = np.array([name in rules.select.protect for name in domains], bool)
        self.rates = [rules.select.domains.get(name, rules.keep) for name in domains]
        self.revive = rules.select.revive
        self._domains = [_Domain() for _ in domains]

    def decide(self, batch: ShardScores) -> Codes:
        """The reason of each record of the next batch: codes [N], indices into `REASONS`.

        Raises `DataError` for an invalid batch or, with `on_error=fail`, an unscored record.
        """
        check_shard(batch, len(self.domains))
        unscored = ~np.isfinite(batch.score)
        if self.on_error is OnError.fail and unscored.any():
            fix = "score them again, or set on_error=keep or on_error=drop"
            raise DataError(f"{unscored.sum()} records of {batch.name} have no finite score: {fix}")
        codes = screen(batch, self.protected, self.noise, self.on_error)
        score = score_bits(batch.score)
        for domain in np.unique(batch.domain):
            if not self.protected[domain]:
                rows = np.flatnonzero(batch.domain == domain)
                codes[rows] = self._decide(int(domain), codes[rows], score[rows], batch.hash[rows], batch.weight[rows])
        return codes

    def _decide(self, domain: int, codes: Codes, score: Integers, hash_: NDArray[np.uint64], weight: Integers) -> Codes:
        state, rate = self._domains[domain], self.rates[domain]
        easy = codes == CODE[Reason.easy]
        revived = easy & (shuffled(hash_) < np.uint64(_probability(self.revive, rate) * (2**64 - 1025)))
        # revived records are kept regardless of the threshold, so they count before it moves
        given = int(weight[revived | (codes == CODE[Reason.protected])].sum())
        state.seen += int(weight.sum())
        state.kept += given
        competing = easy & ~revived
        if competing.any():
            owed = rate * state.seen - state.kept
            wanted = rate * int(weight.sum()) - given
            asked = wanted + _REPAID * (owed - wanted)
            slack = _TOLERANCE * rate * state.seen
            state.key, kept = _moved(
                state.key, score[competing], hash_[competing], weight[competing], asked, owed - slack, owed + slack
            )
            state.kept += kept
        above = easy & _reached(state.key, score, hash_)
        codes[revived] = CODE[Reason.revived]
        codes[above] = CODE[Reason.hard]
        return codes


def check_floor(rules: FilterRules) -> None:
    if rules.select.floor:
        reason = "cannot be applied to a stream, whose number of records is unknown"
        raise ConfigError("select.floor", rules.select.floor, reason, [0])


def _probability(revive: float, rate: float) -> float:
    """Of reviving a record below the threshold, such that revived records are a share `revive` of the kept."""
    return revive * rate / (1 - (1 - revive) * rate) if revive else 0.0


def _reached(key: int | None, score: Integers, hash_: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if key is None:
        return np.zeros(len(score), bool)
    return ThresholdKeys((key,)).reached(np.zeros(len(score), np.int64), score, hash_)


def _moved(
    key: int | None,
    score: Integers,
    hash_: NDArray[np.uint64],
    weight: Integers,
    asked: float,
    least: float,
    most: float,
) -> tuple[int, int]:
    """Move the threshold towards keeping a weight `asked` of these records, clamped to [least, most]. Returns it and
    the weight that it keeps. It does not move where no record lies between.
    """
    order = np.lexsort((~hash_, -score))
    total = np.concatenate([[0], np.cumsum(weight[order])])
    now = int(_reached(key, score, hash_).sum())
    goal = asked if key is None else total[now] + _STEP * (asked - total[now])
    goal = min(max(goal, least), most)
    after = min(int(np.searchsorted(total, goal, "left")), len(order))
    if after and abs(total[after - 1] - goal) < abs(total[after] - goal):
        after -= 1
    if key is None or after != now:
        edge = order[after - 1] if after else order[0]
        key = (int(score[edge]) << 64) + int(hash_[edge]) + (not after)
    kept = _reached(key, score, hash_)
    return key, int(weight[kept].sum())
