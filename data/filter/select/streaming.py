"""Selection from a stream without end: batch by batch, at a rate that is held whatever the stream does.

Each domain has a threshold key (score, then hash) that is carried from batch to batch and moved no further than the
rate needs. An integral controller says how much of a batch is to stay: what the keep rate asks for, plus part of what
all batches so far owe. It moves in ranks of the batch and not in scores, so it needs no scale: drift, ties and heavy
tails are all the same to it. What it trades away against `select`: the kept are the hardest of their time, not of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
    check_names,
    check_shard,
    lot,
    score_word,
    screen,
)

_HALF_WAY = 0.5
"""How far a threshold goes, in one batch, from where it is to where the batch would have it. Measured over batches of
512 and 4,096 records: at 0.25 a drift of a fifth of the spread a batch leaves 3% of 49 batches owing, at 0.5 half a
per cent; at 1 the threshold is the batch's own quantile and remembers nothing.
"""
_REPAID = 0.5
"""Share of what is owed that a batch is asked to make up for."""
_TOLERANCE = 0.005
"""Share of the target by which the total may be off; a threshold that would leave it further off moves all the way."""


@dataclass
class _Domain:
    """`key`: None before the first batch. `seen`, `kept`: weight so far."""

    key: int | None = None
    seen: int = 0
    kept: int = 0


class StreamSelector:
    """Decides each batch by itself and those before it. Where several ranks decide, each must see the same batches.

    `rules` and `noise` are as in `select`. The total kept of each domain is within half a per cent of its rate, or half
    of the largest document at a threshold so far, provided that enough is neither noise nor unscored; what these take
    is made up for later. Length buckets and `floor` need all records: the former are not made here, the latter is
    refused. `revive` is by lot with a fixed chance, so its share holds on average.

    Raises `ConfigError` for rules that a stream cannot follow.
    """

    def __init__(self, domains: Sequence[str], rules: FilterRules, noise: float | None = None) -> None:
        check_names(domains, rules)
        if rules.select.floor:
            raise ConfigError("select.floor", rules.select.floor, "a stream has no number of records to fill up", [0])
        self.domains, self.noise, self.on_error = tuple(domains), noise, rules.on_error
        self.protected = np.array([name in rules.select.protect for name in domains], bool)
        self.rates = [rules.select.domains.get(name, rules.keep) for name in domains]
        self.revive = rules.select.revive
        self._domains = [_Domain() for _ in domains]

    def decide(self, batch: ShardScores) -> Codes:
        """What becomes of each record of the next batch: codes [N], places in `select.REASONS`.

        Raises `DataError` where the batch cannot be right, or has unscored records and `on_error=fail`.
        """
        check_shard(batch, len(self.domains))
        unscored = ~np.isfinite(batch.score)
        if self.on_error is OnError.fail and unscored.any():
            raise DataError(
                f"{unscored.sum()} records of {batch.name} have no finite score: score them again, or set "
                "on_error=keep or on_error=drop"
            )
        codes = screen(batch, self.protected, self.noise, self.on_error)
        score = score_word(batch.score)
        for domain in np.unique(batch.domain):
            if not self.protected[domain]:
                rows = np.flatnonzero(batch.domain == domain)
                codes[rows] = self._decide(int(domain), codes[rows], score[rows], batch.hash[rows], batch.weight[rows])
        return codes

    def _decide(self, domain: int, codes: Codes, score: Integers, hash_: NDArray[np.uint64], weight: Integers) -> Codes:
        state, rate = self._domains[domain], self.rates[domain]
        easy = codes == CODE[Reason.easy]
        lucky = easy & (lot(hash_) < np.uint64(_chance(self.revive, rate) * (2**64 - 1025)))
        # the lucky stay whatever the threshold, so they count as kept before it is moved
        given = int(weight[lucky | (codes == CODE[Reason.protected])].sum())
        state.seen += int(weight.sum())
        state.kept += given
        rivals = easy & ~lucky
        if rivals.any():
            owed = rate * state.seen - state.kept
            wanted = rate * int(weight.sum()) - given
            asked = wanted + _REPAID * (owed - wanted)
            slack = _TOLERANCE * rate * state.seen
            state.key, kept = _moved(
                state.key, score[rivals], hash_[rivals], weight[rivals], asked, owed - slack, owed + slack
            )
            state.kept += kept
        above = easy & _reached(state.key, score, hash_)
        codes[lucky] = CODE[Reason.revived]
        codes[above] = CODE[Reason.hard]
        return codes

    def state(self) -> dict[str, Any]:
        """All that the next decision depends on, as JSON."""
        return {name: asdict(domain) for name, domain in zip(self.domains, self._domains, strict=True)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on after `state()`. Raises `DataError` where it is of other domains."""
        if tuple(state) != self.domains:
            raise DataError(f"the filter's state is of domains {list(state)}, these are {list(self.domains)}")
        self._domains = [_Domain(**fields) for fields in state.values()]


def _chance(revive: float, rate: float) -> float:
    """Of being revived for a record below the threshold, such that these are a share `revive` of all that stays."""
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
    """The threshold, moved towards keeping a weight `asked` of these records, within [least, most] if that is nearer
    than where it is; and the weight that it keeps. It stays where no record lies between.
    """
    order = np.lexsort((~hash_, -score))
    total = np.concatenate([[0], np.cumsum(weight[order])])
    now = int(_reached(key, score, hash_).sum())
    goal = asked if key is None else total[now] + _HALF_WAY * (asked - total[now])
    goal = min(max(goal, least), most)
    after = int(np.searchsorted(total, goal, "left"))
    after = min(after, len(order))
    if after and abs(total[after - 1] - goal) < abs(total[after] - goal):
        after -= 1
    if key is None or after != now:
        edge = order[after - 1] if after else order[0]
        key = (int(score[edge]) << 64) + int(hash_[edge]) + (not after)
    kept = _reached(key, score, hash_)
    return key, int(weight[kept].sum())
