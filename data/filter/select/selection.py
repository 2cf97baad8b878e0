"""Select exactly by score, identically on any number of ranks, without holding all scores in memory.

A record's key is its quantised score followed by its hash. Each group (the records of one domain and length bucket)
keeps the records at or above a threshold key. A radix search finds the threshold: each pass over the shards makes one
histogram per group, over the next bits of those keys that begin with the bits found so far. Histograms are integers and
are summed over ranks, so the result depends neither on the number of ranks nor on the order or partition of the shards.
A histogram has at most `_BINS` cells; more groups mean fewer bits per pass and more passes.

Shapes: N records of a shard, D domains, G groups, L bins of length. The weight of a record is 1 or its tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import DataError
from data.filter.config import FilterRules, OnError
from data.filter.input.records import Reason

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Hashes = NDArray[np.uint64]
Codes = NDArray[np.uint8]
SumOverRanks = Callable[[Integers], Integers]
"""Element-wise sum of an array over all ranks. All ranks call it in the same order with the same shapes."""

REASONS = tuple(Reason)
"""The code of a reason is its index here."""
CODE = {reason: np.uint8(place) for place, reason in enumerate(REASONS)}

_FINE, _FINE_BITS = 8192, 16
_LARGEST = 2**31 - 1
_SCORE_BITS, _HASH_BITS = 32, 64
NOTHING = 1 << (_SCORE_BITS + _HASH_BITS)
"""A threshold above all keys, which keeps no record."""
_BINS = 1 << 22
"""Maximum cells of a histogram: 32 MiB as int64. A pass has two histograms (documents and weight)."""
_DIGIT_BITS = 16
_OCTAVES, _LENGTH_BITS = 32, 7
_LENGTHS = _OCTAVES << _LENGTH_BITS
_SMALLEST_BUCKET = 32
"""Minimum number of records per length bucket. In smaller buckets, length would decide instead of the score."""


@dataclass(frozen=True)
class ShardScores:
    """Records of one shard that passed the screen, as arrays [N].

    `domain` indexes the names given to `select`. `length` decides the bucket. `weight` is 1 or the number of tokens;
    `keep` is a fraction of the total weight. `hash` is the hash of (seed, id). `name` is for error messages.
    """

    name: str
    score: Floats
    domain: Integers
    length: Integers
    weight: Integers
    hash: Hashes


Shards = Callable[[], Iterable[ShardScores]]
"""Returns the shards of this rank; called once per pass."""


def quantise(score: Floats) -> Integers:
    """Convert scores to 32-bit fixed point, so that thresholds are integers. Monotone; NaN and infinity become 0.

    The step is 2^-16 up to an absolute value of 8,192 (losses, ratios, grades) and 1 beyond (lengths, up to 1.6e9).
    """
    size = np.abs(np.where(np.isfinite(score), score, 0.0))
    knee = _FINE << _FINE_BITS
    fine, coarse = np.minimum(size, _FINE) * (1 << _FINE_BITS), np.clip(size - _FINE, 0, _LARGEST - knee)
    steps = np.rint(fine).astype(np.int64) + np.rint(coarse).astype(np.int64)
    return np.where(score < 0, -steps, steps)


def length_bin(length: Integers) -> Integers:
    """Map lengths to bins, monotonically: one length per bin below 256, bins of less than 0.8% above, up to 4 GiB.

    The number of a bin is the leading bits of the length as a float: the exponent and 7 bits of the mantissa.
    """
    value = np.clip(length, 1, 2**_OCTAVES - 1).astype(np.float64)
    return (value.view(np.int64) >> (52 - _LENGTH_BITS)) - (1023 << _LENGTH_BITS)


def shortest(bin: Integers) -> Integers:
    """Return the smallest length of each bin."""
    value = ((bin + (1023 << _LENGTH_BITS)) << (52 - _LENGTH_BITS)).view(np.float64)
    return np.ceil(value).astype(np.int64)


def noise_threshold(clean: Floats, quantile: float) -> float:
    """Return the score above which a record is noise: a `quantile` of the scores of clean reference text.

    A quantile of the data itself would lie within the noise if a fraction above 1 - quantile of the data were noise.
    Raises `DataError` if no clean score is finite.
    """
    finite = clean[np.isfinite(clean)]
    if not len(finite):
        raise DataError("select.clean: the reference text has no finite score")
    return float(np.quantile(finite, quantile, method="higher"))


def screen(shard: ShardScores, protected: NDArray[np.bool_], noise: float | None, on_error: OnError) -> Codes:
    """Return codes [N], which are final for noise, unscored and protected records. All other records are `easy`."""
    codes = np.full(len(shard.score), CODE[Reason.easy])
    if noise is not None:
        codes[quantise(shard.score) > quantise(np.array([noise]))] = CODE[Reason.noise]
    unscored = ~np.isfinite(shard.score)
    codes[unscored] = CODE[Reason.protected if on_error is OnError.keep else Reason.unscored]
    codes[protected[shard.domain]] = CODE[Reason.protected]
    return codes


@dataclass(frozen=True)
class ThresholdKeys:
    """Threshold keys, one per group, as 96-bit integers: score, then hash."""

    values: tuple[int, ...]

    @cached_property
    def _parts(self) -> tuple[Integers, Hashes]:
        scores = np.array([value >> _HASH_BITS for value in self.values], np.int64)
        return scores, np.array([value & (1 << _HASH_BITS) - 1 for value in self.values], np.uint64)

    def reached(self, group: Integers, score: Integers | int, hash_: Hashes) -> NDArray[np.bool_]:
        """Return whether each record [N] is at or above the threshold of its group. `score` is from `score_bits`."""
        scores, hashes = (part[group] for part in self._parts)
        return (score > scores) | ((score == scores) & (hash_ >= hashes))


@dataclass(frozen=True, eq=False)
class Thresholds:
    """The thresholds of every group, identical on every rank.

    `starts`: for each domain, the first length bin of each bucket; a domain's groups are its buckets in this order.
    `hard` has one key per group, and `revived` and `floor` have one key per domain. `target` is the weight to keep of
    each domain, and `passed` the weight of all records of each domain.
    """

    domains: tuple[str, ...]
    protected: NDArray[np.bool_]
    on_error: OnError
    noise: float | None
    starts: tuple[Integers, ...]
    hard: ThresholdKeys
    revived: ThresholdKeys
    floor: ThresholdKeys
    target: Floats
    passed: Integers

    @cached_property
    def _first_pairs(self) -> Integers:
        """First pair (domain * L + length bin) of each group, [G], ascending."""
        return self.domain_of_group * _LENGTHS + np.concatenate(self.starts)

    def group_of_pair(self, pair: Integers) -> Integers:
        """Return the group of each pair (domain * L + length bin)."""
        return np.searchsorted(self._first_pairs, pair, "right") - 1

    @property
    def domain_of_group(self) -> Integers:
        return np.repeat(np.arange(len(self.starts)), [len(starts) for starts in self.starts])

    def group(self, shard: ShardScores) -> Integers:
        """Return the group of each record, [N]."""
        return self.group_of_pair(_pairs(shard))

    def reasons(self, shard: ShardScores) -> Codes:
        """Return the reason of each record of a shard: codes [N], indices into `REASONS`."""
        codes = screen(shard, self.protected, self.noise, self.on_error)
        score = score_bits(shard.score)
        steps = (
            (Reason.hard, self.hard, self.group(shard), score, shard.hash),
            (Reason.revived, self.revived, shard.domain, 0, second_hash(shard.hash)),
            (Reason.protected, self.floor, shard.domain, score, shard.hash),
        )
        for reason, keys, group, first, second in steps:
            if min(keys.values, default=NOTHING) < NOTHING:
                codes[(codes == CODE[Reason.easy]) & keys.reached(group, first, second)] = CODE[reason]
        return codes

    @property
    def thresholds(self) -> dict[str, Any]:
        """The thresholds as JSON, for the audit. `key` is the exact threshold; `score` shows it to people."""
        first, described = np.cumsum([0, *map(len, self.starts)]), {}
        for place, name in enumerate(self.domains):
            keys = self.hard.values[first[place] : first[place + 1]]
            described[name] = {
                "passed": int(self.passed[place]),
                "target": float(self.target[place]),
                "protected": bool(self.protected[place]),
                "buckets": [
                    {"bin": int(bin_), "length": int(shortest(bin_)), "score": _readable(key), "key": f"{key:x}"}
                    for bin_, key in zip(self.starts[place], keys, strict=True)
                ],
                "revived": f"{self.revived.values[place]:x}",
                "floor": f"{self.floor.values[place]:x}",
            }
        return {"noise": self.noise, "on_error": self.on_error.value, "domains": described}


def score_bits(score: Floats) -> Integers:
    """Return the first 32 bits of a key: the quantised score, shifted to be positive."""
    return quantise(score) + _LARGEST + 1


def second_hash(hash_: Hashes) -> Hashes:
    """Return the hash with its halves exchanged, for another random choice: the high bits already decide ties."""
    return (hash_ << np.uint64(32)) | (hash_ >> np.uint64(32))


def _readable(key: int) -> float | None:
    """Return the score of a threshold key; None for a key that no record reaches."""
    if key >= NOTHING:
        return None
    steps = (key >> _HASH_BITS) - _LARGEST - 1
    knee = _FINE << _FINE_BITS
    size = min(abs(steps), knee) / (1 << _FINE_BITS) + max(abs(steps) - knee, 0)
    return float(size if steps >= 0 else -size)


def select(
    shards: Shards,
    domains: Sequence[str],
    rules: FilterRules,
    noise: float | None = None,
    sum_over_ranks: SumOverRanks = lambda array: array,
    by_length: Integers | None = None,
) -> Thresholds:
    """Select by score in each domain separately.

    `shards` returns the shards of this rank. `domains` are all names, the same on every rank. `noise` is from
    `noise_threshold`. `by_length` [D]: whether a domain has length buckets; None: all have.

    A domain's target is its keep rate times the weight of all its records, but at most the weight of the records that
    can be kept: not noise, and unscored records only with `on_error=keep`. Each length bucket keeps the same fraction
    of its competing records. Rounding errors carry over to the next bucket, so a domain is within
    half a document of its target. `floor` then adds the easy records with the highest scores.

    Raises `DataError` for an unscored record with `on_error=fail`.
    """
    search = _Search(shards, sum_over_ranks)
    count, each = len(domains), np.arange(len(domains))
    protected = np.array([name in rules.select.protect for name in domains], bool)
    census = search.census(domains, protected, noise, rules.on_error)
    rate = np.array([rules.select.domains.get(name, rules.keep) for name in domains], np.float64)
    target = np.clip(rate * census.passed[1] - census.kept[1], 0, census.easy[1])
    most = np.where(np.ones(count) if by_length is None else by_length, rules.select.length_buckets, 1)
    starts = _buckets(census.pair, census.count[0], most)
    none, no_domain = (ThresholdKeys((NOTHING,) * size) for size in (sum(map(len, starts)), count))
    aim = np.where(protected, census.passed[1], target + census.kept[1])
    limits = (starts, none, no_domain, no_domain, aim, census.passed[1])
    decision = Thresholds(tuple(domains), protected, rules.on_error, noise, *limits)
    domain = decision.domain_of_group
    available = np.zeros(len(domain), np.int64)
    np.add.at(available, decision.group_of_pair(census.pair), census.count[1])
    share = target * (1 - rules.select.revive) / np.maximum(census.easy[1], 1)
    wanted = np.minimum(share[domain] * available, available)
    keys, hard = search.keep(decision, wanted, domain, decision.group, _BY_SCORE)
    decision, kept = replace(decision, hard=keys), census.kept + hard
    if rules.select.revive:
        keys, revived = search.keep(decision, np.maximum(target - hard[1], 0), each, _domain, _AT_RANDOM)
        decision, kept = replace(decision, revived=keys), kept + revived
    missing = np.minimum(rules.select.floor, census.kept[0] + census.easy[0]) - kept[0]
    if (missing > 0).any():
        wanted = np.maximum(missing, 0).astype(np.float64)
        decision = replace(decision, floor=search.keep(decision, wanted, each, _domain, _BY_SCORE, documents=True)[0])
    return decision


def _buckets(pair: Integers, documents: Integers, most: Integers) -> tuple[Integers, ...]:
    """Return the first length bin of each bucket, for every domain. `documents` [P]: the number in each `pair`. `most`
    [D]: the maximum number of buckets.

    A bin belongs to the bucket of its first document, so one length is never in two buckets. A bucket may be empty.
    """
    ends, found = np.searchsorted(pair, np.arange(len(most) + 1) * _LENGTHS), []
    for (begin, end), limit in zip(itertools.pairwise(ends), most.tolist(), strict=True):
        up_to = np.cumsum(documents[begin:end])
        total = int(up_to[-1]) if len(up_to) else 0
        buckets = int(np.clip(total // _SMALLEST_BUCKET, 1, limit))
        # the bucket of the first document after each bin; where it rises, the next bin begins that bucket
        place = np.minimum(up_to * buckets // max(total, 1), buckets - 1)
        after = pair[begin:end] % _LENGTHS + 1
        found.append(np.concatenate([[0], after[np.searchsorted(place, np.arange(1, buckets), "left")]]))
    return tuple(found)


def _pairs(shard: ShardScores) -> Integers:
    """Return domain * L + length bin of each record."""
    return shard.domain * _LENGTHS + length_bin(shard.length)


def _added(parts: Sequence[tuple[Integers, Integers]]) -> tuple[Integers, Integers]:
    """Merge parts: the distinct pairs [P], ascending, and the sums of their documents and weight [2, P]."""
    pair, place = np.unique(np.concatenate([pair for pair, _ in parts]), return_inverse=True)
    total, counts = np.zeros((2, len(pair)), np.int64), np.concatenate([count for _, count in parts], 1)
    for row, count in zip(total, counts, strict=True):
        np.add.at(row, place, count)
    return pair, total


@dataclass(frozen=True)
class _Census:
    """Documents and weight [2, D] of all records (`passed`), of those kept without competing, and of those that compete
    (`easy`). `count` [2, P] has the documents and weight that compete, by `pair` [P] of domain and length bin.
    """

    passed: Integers
    kept: Integers
    easy: Integers
    pair: Integers
    count: Integers


@dataclass(frozen=True)
class _Crossing:
    """Where the cumulative weight of each group, from the highest key down, crosses the wanted weight.

    `include` and `exclude` are the thresholds with and without the records at the crossing. `at` [2, G] is the
    documents and weight of the records at the crossing, and `before` [2, G] that of the records above it.
    """

    include: list[int]
    exclude: list[int]
    before: Integers
    at: Integers


@dataclass(frozen=True)
class _Key:
    """A sort key. `words`: the words of a shard's keys, each [N], most significant first. `bits`: size of each word."""

    words: Callable[[ShardScores], tuple[NDArray[Any], ...]]
    bits: tuple[int, ...]


_BY_SCORE = _Key(lambda shard: (score_bits(shard.score), shard.hash), (_SCORE_BITS, _HASH_BITS))
_AT_RANDOM = _Key(lambda shard: (second_hash(shard.hash),), (_HASH_BITS,))
_domain = attrgetter("domain")


@dataclass(frozen=True)
class _Search:
    """Makes passes over the shards of this rank."""

    shards: Shards
    sum_over_ranks: SumOverRanks

    def census(
        self, domains: Sequence[str], protected: NDArray[np.bool_], noise: float | None, on_error: OnError
    ) -> _Census:
        """Make the first pass: sum documents and weight by domain, and by length bin for records that compete."""
        count = len(domains)
        totals = np.zeros((3, 2, count), np.int64)
        parts = [(np.zeros(0, np.int64), np.zeros((2, 0), np.int64))]
        example = "a shard of another rank"
        for shard in self.shards():
            codes = screen(shard, protected, noise, on_error)
            unscored = ~np.isfinite(shard.score)
            if unscored.any():
                example = f"shard {shard.name}"
            easy = codes == CODE[Reason.easy]
            _count_into(totals[0], shard.domain, shard.weight)
            _count_into(totals[1], *_masked(codes == CODE[Reason.protected], shard.domain, shard.weight))
            _count_into(totals[2], *_masked(unscored, shard.domain, shard.weight))
            pair, weight = _masked(easy, _pairs(shard), shard.weight)
            parts.append((pair, np.stack([np.ones_like(weight), weight])))
            if sum(len(pair) for pair, _ in parts[1:]) > len(parts[0][0]) + _BINS // 8:
                parts = [_added(parts)]
        passed, kept, missing = self.sum_over_ranks(totals)
        if on_error is OnError.fail and missing[0].sum():
            names = [name for name, some in zip(domains, missing[0], strict=True) if some]
            raise DataError(
                f"{missing[0].sum()} records have no finite score (domains {', '.join(names[:8])}; one is in "
                f"{example}): score them again, or set on_error=keep or on_error=drop"
            )
        pair, counts = self._add_ranks(*_added(parts), count)
        easy = np.zeros((2, count), np.int64)
        for row, values in zip(easy, counts, strict=True):
            np.add.at(row, pair // _LENGTHS, values)
        return _Census(passed, kept, easy, pair, counts)

    def _add_ranks(self, pair: Integers, count: Integers, domains: int) -> tuple[Integers, Integers]:
        """Sum the census over ranks, for as many domains at a time as fit into `_BINS` cells."""
        found, step = [(pair[:0], count[:, :0])], max(1, _BINS // _LENGTHS) * _LENGTHS
        for first in range(0, domains * _LENGTHS, step):
            begin, end = np.searchsorted(pair, [first, first + step])
            table = np.zeros((2, min(step, domains * _LENGTHS - first)), np.int64)
            table[:, pair[begin:end] - first] = count[:, begin:end]
            table = self.sum_over_ranks(table)
            there = np.flatnonzero(table[0])
            found.append((there + first, table[:, there]))
        return np.concatenate([pair for pair, _ in found]), np.concatenate([count for _, count in found], 1)

    def keep(
        self,
        decision: Thresholds,
        wanted: Floats,
        domain: Integers,
        group_of: Callable[[ShardScores], Integers],
        key: _Key,
        documents: bool = False,
    ) -> tuple[ThresholdKeys, Integers]:
        """Find the key of each group that keeps a weight `wanted` [G] of the group's records that are still easy. With
        `documents`, every record has the weight 1. `domain`: the domain of each group. Also returns the documents and
        weight kept of each domain, [2, D].

        A radix search from the most significant digit finds the key where a group's cumulative weight crosses `wanted`.
        A group is done if the weight is exact, or if one record or only equal keys remain at the crossing. A group with
        `wanted` 0 keeps nothing, and a group with less weight than `wanted` keeps everything.
        """
        count, rest, low = len(wanted), sum(key.bits), [0] * len(wanted)
        crossing = _Crossing([1 << rest] * count, [1 << rest] * count, *np.zeros((2, 2, count), np.int64))
        prefixes = np.zeros((len(key.bits), count), np.uint64)
        open_ = np.flatnonzero(wanted > 0)
        for place, size in enumerate(key.bits):
            done = 0
            while len(open_) and done < size:
                width = min(_DIGIT_BITS, size - done, max(1, (_BINS // len(open_)).bit_length() - 1))
                done, rest = done + width, rest - width
                cell = np.full(count, -1)
                cell[open_] = np.arange(len(open_))
                table = np.zeros((2, len(open_) << width), np.int64)
                for shard in self.shards():
                    group, words = group_of(shard), [word.astype(np.uint64) for word in key.words(shard)]
                    leading = words[place] >> np.uint64(size - done)
                    inside = (decision.reasons(shard) == CODE[Reason.easy]) & (cell[group] >= 0)
                    inside &= (leading >> np.uint64(width)) == prefixes[place][group]
                    for word, prefix in zip(words[:place], prefixes, strict=False):
                        inside &= word == prefix[group]
                    weight = np.ones_like(shard.weight) if documents else shard.weight
                    group, leading, weight = _masked(inside, group, leading, weight)
                    digit = (leading & np.uint64((1 << width) - 1)).astype(np.int64)
                    _count_into(table, (cell[group] << width) + digit, weight)
                tables = self.sum_over_ranks(table).reshape(2, len(open_), -1)
                for row, one in enumerate(open_):
                    bin_, above, at = _crossing_bin(tables[:, row], wanted[one] - crossing.before[1, one])
                    low[one] = (low[one] << width) + bin_
                    prefixes[place, one] = max(low[one], 0) & ((1 << done) - 1)
                    crossing.at[:, one] = at
                    crossing.before[:, one] += above
                    crossing.exclude[one] = (low[one] + 1) << rest
                    crossing.include[one] = low[one] << rest if at[0] else crossing.exclude[one]
                open_ = open_[crossing.at[0, open_] > 1]
        return _round(crossing, wanted, domain, len(decision.domains))


def _crossing_bin(table: Integers, wanted: float) -> tuple[int, Integers, Integers]:
    """Return the bin of `table` [2, bins] in which the weight, summed from the last bin down, exceeds `wanted`, and the
    documents and weight above that bin and in it (0 if the sum is exact without it). The bin is -1 if all are wanted.
    """
    from_here = np.cumsum(table[:, ::-1], 1)[:, ::-1]
    bin_ = int((from_here[1] > wanted).sum()) - 1
    above = from_here[:, bin_] - table[:, bin_] if bin_ >= 0 else from_here[:, 0]
    return bin_, above, np.zeros(2, np.int64) if above[1] == wanted or bin_ < 0 else table[:, bin_]


def _round(crossing: _Crossing, wanted: Floats, domain: Integers, domains: int) -> tuple[ThresholdKeys, Integers]:
    """Decide for every group whether its records at the crossing are kept. Return the keys, and the documents and
    weight kept [2, D].

    A group's rounding error carries over to the next group of its domain, from long records to short ones. So the error
    of a domain is at most half the weight of its largest record at a crossing. If both choices are equally close to the
    target, the records are kept, so that no domain disappears.
    """
    keys, kept, carry = [], np.zeros((2, domains), np.int64), np.zeros(domains)
    for group in reversed(range(len(wanted))):
        without = carry[domain[group]] + wanted[group] - crossing.before[1, group]
        with_them = without - crossing.at[1, group]
        stay = abs(with_them) <= abs(without)
        carry[domain[group]] = with_them if stay else without
        kept[:, domain[group]] += crossing.before[:, group] + stay * crossing.at[:, group]
        keys.append(crossing.include[group] if stay else crossing.exclude[group])
    return ThresholdKeys(tuple(reversed(keys))), kept


def _masked(mask: NDArray[np.bool_], *arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    return tuple(array[mask] for array in arrays)


def _count_into(table: Integers, place: Integers, weight: Integers) -> None:
    """Add one document and its weight to `table` [2, ...] at each `place`."""
    np.add.at(table[0], place, 1)
    np.add.at(table[1], place, weight)
