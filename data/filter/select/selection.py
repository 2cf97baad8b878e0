"""Which records stay, by score: exact, the same on any number of ranks, and never with all scores in memory.

Every record has a key: its quantised score, then its hash. In each group (a domain's records of like length) those from
a threshold key upwards are kept. The threshold is found digit by digit: each pass over the shards adds up one histogram
per group of the next bits of the keys that share the digits found so far. Histograms are integers and are added over
ranks, so the outcome depends neither on the number of ranks nor on the order or partition of the shards; no more than
`_BINS` of their cells are in memory, whatever the number of groups (more groups: fewer bits a pass, more passes). Of
lengths, only those that occur in a domain are counted.

Shapes: N records of a shard, D domains, G groups, L bins of length. Weights are documents (1 each) or tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, DataError
from data.filter.config import FilterRules, OnError
from data.filter.input.records import Reason

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Hashes = NDArray[np.uint64]
Codes = NDArray[np.uint8]
SumOverRanks = Callable[[Integers], Integers]
"""Element-wise sum over all ranks of an array whose shape is the same on each; called in the same order on each."""

REASONS = tuple(Reason)
"""What a code means: its place in here."""
CODE = {reason: np.uint8(place) for place, reason in enumerate(REASONS)}

_FINE, _FINE_BITS = 8192, 16
_LARGEST = 2**31 - 1
_SCORE_BITS, _HASH_BITS = 32, 64
_NOTHING = 1 << (_SCORE_BITS + _HASH_BITS)
"""A threshold above every key."""
_BINS = 1 << 22
"""Cells of one histogram in memory: 32 MiB as int64, of which a pass has two (documents and weight)."""
_DIGIT_BITS = 16
_OCTAVES, _LENGTH_BITS = 32, 7
_LENGTHS = _OCTAVES << _LENGTH_BITS
_SMALLEST_BUCKET = 32
"""Records that a length bucket has at least. With one or two, length would choose in place of the score."""


@dataclass(frozen=True)
class ShardScores:
    """Records of one shard that passed the gates; arrays of one length N.

    `domain` is an index into the names given to `select`; `length` is in bytes or tokens, whatever the buckets are to
    be taken in; `weight` is what `keep` is a share of: 1 for documents, tokens for tokens; `hash` is of (seed, id).
    `name` is for error messages.
    """

    name: str
    score: Floats
    domain: Integers
    length: Integers
    weight: Integers
    hash: Hashes


Shards = Callable[[], Iterable[ShardScores]]
"""This rank's shards, from the first: called once for each pass."""


def quantise(score: Floats) -> Integers:
    """Scores in fixed point of 32 bits, so that thresholds are compared as integers; monotone; not finite becomes 0.

    Steps of 2^-16 up to 8,192 in size (losses, ratios, marks), of 1 beyond (lengths), clamped at 1.6 billion.
    """
    size = np.abs(np.where(np.isfinite(score), score, 0.0))
    knee = _FINE << _FINE_BITS
    steps = np.rint(np.minimum(size, _FINE) * (1 << _FINE_BITS)).astype(np.int64)
    if (size > _FINE).any():
        steps = steps + np.rint(np.clip(size - _FINE, 0, _LARGEST - knee)).astype(np.int64)
    return np.where(score < 0, -steps, steps)


def length_bin(length: Integers) -> Integers:
    """Monotone bins of length: exact below 256, of less than 0.8% width above, up to 4 GiB.

    They are the leading bits of the float: exponent and 7 bits of mantissa.
    """
    value = np.clip(length, 1, 2**_OCTAVES - 1).astype(np.float64)
    return (value.view(np.int64) >> (52 - _LENGTH_BITS)) - (1023 << _LENGTH_BITS)


def shortest(bin: Integers) -> Integers:
    """The smallest length of each bin."""
    value = ((bin + (1023 << _LENGTH_BITS)) << (52 - _LENGTH_BITS)).view(np.float64)
    return np.ceil(value).astype(np.int64)


def noise_threshold(clean: Floats, quantile: float) -> float:
    """The score above which a record is noise: a `quantile` of the scores of clean reference text.

    Never a quantile of the data itself: with more junk than 1 - quantile it would lie within the junk.
    Raises `DataError` where no clean score is finite.
    """
    finite = clean[np.isfinite(clean)]
    if not len(finite):
        raise DataError("select.clean: the reference text has no finite score")
    return float(np.quantile(finite, quantile, method="higher"))


def screen(shard: ShardScores, protected: NDArray[np.bool_], noise: float | None, on_error: OnError) -> Codes:
    """What needs no comparison with other records, as codes [N]; what is left to compete is `easy`."""
    codes = np.full(len(shard.score), CODE[Reason.easy])
    if noise is not None:
        codes[quantise(shard.score) > quantise(np.array([noise]))] = CODE[Reason.noise]
    unscored = ~np.isfinite(shard.score)
    codes[unscored] = CODE[Reason.protected if on_error is OnError.keep else Reason.unscored]
    codes[protected[shard.domain]] = CODE[Reason.protected]
    return codes


@dataclass(frozen=True)
class ThresholdKeys:
    """Threshold keys of some groups, `values` as integers of 96 bits: score, then hash."""

    values: tuple[int, ...]

    @cached_property
    def _parts(self) -> tuple[Integers, Hashes]:
        scores = np.array([value >> _HASH_BITS for value in self.values], np.int64)
        return scores, np.array([value & (1 << _HASH_BITS) - 1 for value in self.values], np.uint64)

    def reached(self, group: Integers, score: Integers | int, hash_: Hashes) -> NDArray[np.bool_]:
        """Which records [N] are at or above the threshold of their group; `score` from 0 upwards."""
        scores, hashes = (part[group] for part in self._parts)
        return (score > scores) | ((score == scores) & (hash_ >= hashes))


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Thresholds for every group, and what they make of a record. The same on every rank; compare `thresholds`.

    `starts`: for each domain, the first length bin of each bucket; a domain's groups are its buckets in that order.
    `hard` has a key per group, `revived` and `floor` one per domain. `target`: weight to be kept of each domain,
    `passed`: weight of all its records.
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
        """The first pair (domain * L + length bin) of each group, [G]; not descending."""
        return np.repeat(np.arange(len(self.starts)), [len(starts) for starts in self.starts]) * _LENGTHS + (
            np.concatenate(self.starts)
        )

    def group_of_pair(self, pair: Integers) -> Integers:
        """Group of each domain * L + length bin."""
        return np.searchsorted(self._first_pairs, pair, "right") - 1

    @property
    def domain_of_group(self) -> Integers:
        return np.repeat(np.arange(len(self.starts)), [len(starts) for starts in self.starts])

    def group(self, shard: ShardScores) -> Integers:
        """Group of each record, [N]."""
        return self.group_of_pair(_pairs(shard))

    def reasons(self, shard: ShardScores) -> Codes:
        """What becomes of each record of a shard: codes [N], places in `REASONS`."""
        codes = screen(shard, self.protected, self.noise, self.on_error)
        score = score_word(shard.score)
        steps = (
            (Reason.hard, self.hard, self.group(shard), score, shard.hash),
            (Reason.revived, self.revived, shard.domain, 0, lot(shard.hash)),
            (Reason.protected, self.floor, shard.domain, score, shard.hash),
        )
        for reason, keys, group, first, second in steps:
            if min(keys.values, default=_NOTHING) < _NOTHING:
                codes[(codes == CODE[Reason.easy]) & keys.reached(group, first, second)] = CODE[reason]
        return codes

    @property
    def thresholds(self) -> dict[str, Any]:
        """All of it as JSON, for the audit and for `load`. `score` is for people, `key` is what is compared."""
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

    @classmethod
    def load(cls, thresholds: dict[str, Any]) -> Thresholds:
        """The decision that `thresholds` describes."""
        domains = thresholds["domains"].values()
        buckets = [domain["buckets"] for domain in domains]
        return cls(
            domains=tuple(thresholds["domains"]),
            protected=np.array([domain["protected"] for domain in domains], bool),
            on_error=OnError(thresholds["on_error"]),
            noise=thresholds["noise"],
            starts=tuple(np.array([bucket["bin"] for bucket in some], np.int64) for some in buckets),
            hard=ThresholdKeys(tuple(int(bucket["key"], 16) for some in buckets for bucket in some)),
            revived=ThresholdKeys(tuple(int(domain["revived"], 16) for domain in domains)),
            floor=ThresholdKeys(tuple(int(domain["floor"], 16) for domain in domains)),
            target=np.array([domain["target"] for domain in domains], np.float64),
            passed=np.array([domain["passed"] for domain in domains], np.int64),
        )


def score_word(score: Floats) -> Integers:
    """The quantised score, shifted to start from 0: the first 32 bits of a key."""
    return quantise(score) + _LARGEST + 1


def lot(hash_: Hashes) -> Hashes:
    """Another draw from the same hash: its halves exchanged, since its first half already decides ties."""
    return (hash_ << np.uint64(32)) | (hash_ >> np.uint64(32))


def _readable(key: int) -> float | None:
    """The score of a threshold key; None where nothing reaches it."""
    if key >= _NOTHING:
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
) -> Thresholds:
    """Choose by score, in each domain by itself.

    `shards` gives this rank's part, `domains` all names, the same on every rank; `noise` is from `noise_threshold`.
    The target of a domain is its keep rate times the weight of all its records, capped by what is left without noise
    and unscored records (with `on_error=keep` the latter count as kept). Each length bucket gives the same share of
    what it has left; what rounding leaves over in one is made up for in the next, so that the domain as a whole is
    within half a document of its target. `floor` is filled up by score, from what is neither noise nor unscored.

    Raises `ConfigError` where the rules name an unknown domain, `DataError` where a shard cannot be right, and where a
    record is unscored and `on_error=fail`.
    """
    check_names(domains, rules)
    search = _Search(shards, sum_over_ranks)
    count = len(domains)
    none = ThresholdKeys((_NOTHING,) * count)
    decision = Thresholds(
        domains=tuple(domains),
        protected=np.array([name in rules.select.protect for name in domains], bool),
        on_error=rules.on_error,
        noise=noise,
        starts=(np.zeros(1, np.int64),) * count,
        hard=none,
        revived=none,
        floor=none,
        target=np.zeros(count),
        passed=np.zeros(count, np.int64),
    )
    census = search.census(decision)
    rate = np.array([rules.select.domains.get(name, rules.keep) for name in domains], np.float64)
    target = np.clip(rate * census.passed[1] - census.kept[1], 0, census.easy[1])
    decision = replace(
        decision,
        starts=_buckets(census.pair, census.count[0], count, rules.select.length_buckets),
        target=np.where(decision.protected, census.passed[1], target + census.kept[1]),
        passed=census.passed[1],
    )
    decision, hard = search.hard(decision, census, target * (1 - rules.select.revive))
    kept = census.kept + hard
    if rules.select.revive:
        decision, revived = search.revived(decision, np.maximum(target - hard[1], 0))
        kept = kept + revived
    missing = np.minimum(rules.select.floor, census.kept[0] + census.easy[0]) - kept[0]
    return search.floor(decision, missing) if (missing > 0).any() else decision


def check_names(domains: Sequence[str], rules: FilterRules) -> None:
    for key, names in (("select.domains", rules.select.domains), ("select.protect", rules.select.protect)):
        for name in names:
            if name not in domains:
                raise ConfigError(key, name, "no record is of this domain", sorted(domains)[:8])


def _buckets(pair: Integers, documents: Integers, domains: int, most: int) -> tuple[Integers, ...]:
    """First length bin of each bucket, for every domain, from the `documents` of the pairs that occur.

    A bin goes where its first document falls, so that one length is never in two buckets; a bucket may be empty.
    """
    ends, found = np.searchsorted(pair, np.arange(domains + 1) * _LENGTHS), []
    for begin, end in itertools.pairwise(ends):
        up_to = np.cumsum(documents[begin:end])
        total = int(up_to[-1]) if len(up_to) else 0
        buckets = int(np.clip(total // _SMALLEST_BUCKET, 1, most))
        # where the documents after each bin that occurs belong: the next bucket begins with the bin after it
        place = np.minimum(up_to * buckets // max(total, 1), buckets - 1)
        after = pair[begin:end] % _LENGTHS + 1
        found.append(np.concatenate([[0], after[np.searchsorted(place, np.arange(1, buckets), "left")]]))
    return tuple(found)


def _pairs(shard: ShardScores) -> Integers:
    """Domain * L + length bin of each record."""
    return shard.domain * _LENGTHS + length_bin(shard.length)


def _added(parts: Sequence[tuple[Integers, Integers]]) -> tuple[Integers, Integers]:
    """Pairs [P], ascending, and their documents and weight [2, P]: those that occur in these, added up."""
    pair, place = np.unique(np.concatenate([pair for pair, _ in parts]), return_inverse=True)
    total, counts = np.zeros((2, len(pair)), np.int64), np.concatenate([count for _, count in parts], 1)
    for row, count in zip(total, counts, strict=True):
        np.add.at(row, place, count)
    return pair, total


@dataclass(frozen=True)
class _Census:
    """Documents and weight [2, D] of all records, of those kept without competing, of those that compete; the last
    also (`count` [2, P]) of each `pair` of domain and length bin that occurs.
    """

    passed: Integers
    kept: Integers
    easy: Integers
    pair: Integers
    count: Integers


@dataclass(frozen=True)
class _Crossing:
    """Where each group's weight, counted from the highest key down, passes what is wanted: at the records `at`.

    `include` and `exclude` are thresholds with and without them. `before` and `at`: documents and weight [2, G].
    """

    include: list[int]
    exclude: list[int]
    before: Integers
    at: Integers


Piece = tuple[NDArray[Any], ...]
"""Of some records: group, word of their keys, weight."""


@dataclass(frozen=True)
class _Search:
    """The passes over the shards."""

    shards: Shards
    sum_over_ranks: SumOverRanks

    def census(self, decision: Thresholds) -> _Census:
        """The first pass: totals, and the checks of every shard."""
        count = len(decision.domains)
        totals = np.zeros((3, 2, count), np.int64)
        parts = [(np.zeros(0, np.int64), np.zeros((2, 0), np.int64))]
        example = "a shard of another rank"
        for shard in self.shards():
            check_shard(shard, count)
            codes = screen(shard, decision.protected, decision.noise, decision.on_error)
            unscored = ~np.isfinite(shard.score)
            if unscored.any():
                example = f"shard {shard.name}"
            easy = codes == CODE[Reason.easy]
            _add(totals[0], shard.domain, shard.weight)
            _add(totals[1], *_where(codes == CODE[Reason.protected], shard.domain, shard.weight))
            _add(totals[2], *_where(unscored, shard.domain, shard.weight))
            pair, weight = _where(easy, _pairs(shard), shard.weight)
            parts.append((pair, np.stack([np.ones_like(weight), weight])))
            if sum(len(pair) for pair, _ in parts[1:]) > len(parts[0][0]) + _BINS // 8:
                parts = [_added(parts)]
        passed, kept, missing = self.sum_over_ranks(totals)
        if decision.on_error is OnError.fail and missing[0].sum():
            names = [name for name, some in zip(decision.domains, missing[0], strict=True) if some]
            raise DataError(
                f"{missing[0].sum()} records have no finite score (domains {', '.join(names[:8])}; one is in "
                f"{example}): score them again, or set on_error=keep or on_error=drop"
            )
        pair, counts = self._over_ranks(*_added(parts), count)
        easy = np.zeros((2, count), np.int64)
        for row, values in zip(easy, counts, strict=True):
            np.add.at(row, pair // _LENGTHS, values)
        return _Census(passed, kept, easy, pair, counts)

    def _over_ranks(self, pair: Integers, count: Integers, domains: int) -> tuple[Integers, Integers]:
        """The same of all ranks, for as many domains at a time as `_BINS` cells hold."""
        found, step = [(pair[:0], count[:, :0])], max(1, _BINS // _LENGTHS) * _LENGTHS
        for first in range(0, domains * _LENGTHS, step):
            begin, end = np.searchsorted(pair, [first, first + step])
            table = np.zeros((2, min(step, domains * _LENGTHS - first)), np.int64)
            table[:, pair[begin:end] - first] = count[:, begin:end]
            table = self.sum_over_ranks(table)
            there = np.flatnonzero(table[0])
            found.append((there + first, table[:, there]))
        return np.concatenate([pair for pair, _ in found]), np.concatenate([count for _, count in found], 1)

    def hard(self, decision: Thresholds, census: _Census, target: Floats) -> tuple[Thresholds, Integers]:
        """The decision with thresholds for `target` [D] by score, and what they keep, [2, D]."""
        domain = decision.domain_of_group
        decision = replace(decision, hard=ThresholdKeys((_NOTHING,) * len(domain)))
        available = np.zeros(len(domain), np.int64)
        np.add.at(available, decision.group_of_pair(census.pair), census.count[1])
        share = target / np.maximum(census.easy[1], 1)
        wanted = np.minimum(share[domain] * available, available)
        crossing = self._by_score(decision, decision.group, lambda shard: shard.weight, wanted)
        keys, kept = _settle(crossing, wanted, domain, len(target))
        return replace(decision, hard=keys), kept

    def revived(self, decision: Thresholds, wanted: Floats) -> tuple[Thresholds, Integers]:
        """The same by lot, from what is still easy; `wanted` [D]."""

        def pieces() -> Iterable[Piece]:
            for shard in self.shards():
                easy = decision.reasons(shard) == CODE[Reason.easy]
                yield _where(easy, shard.domain, lot(shard.hash), shard.weight)

        crossing = self._descend(pieces, wanted, _HASH_BITS)
        keys, kept = _settle(crossing, wanted, np.arange(len(wanted)), len(wanted))
        return replace(decision, revived=keys), kept

    def floor(self, decision: Thresholds, missing: Integers) -> Thresholds:
        """`missing` [D] more documents of each domain, by score, from what is still easy."""
        wanted = np.maximum(missing, 0).astype(np.float64)
        crossing = self._by_score(
            decision, lambda shard: shard.domain, lambda shard: np.ones_like(shard.weight), wanted
        )
        keys, _ = _settle(crossing, wanted, np.arange(len(wanted)), len(wanted))
        return replace(decision, floor=keys)

    def _by_score(
        self,
        decision: Thresholds,
        group: Callable[[ShardScores], Integers],
        weight: Callable[[ShardScores], Integers],
        wanted: Floats,
    ) -> _Crossing:
        """Search by score among what the decision so far calls easy; then, where scores tie, by hash."""

        def scores() -> Iterable[Piece]:
            for shard in self.shards():
                easy = decision.reasons(shard) == CODE[Reason.easy]
                yield _where(easy, group(shard), score_word(shard.score), weight(shard))

        found = self._descend(scores, wanted, _SCORE_BITS)
        tied = found.at[0] > 1
        level = np.array([low if more else -1 for low, more in zip(found.include, tied, strict=True)], np.int64)

        def hashes() -> Iterable[Piece]:
            for shard in self.shards():
                groups = group(shard)
                tie = score_word(shard.score) == level[groups]
                tie &= decision.reasons(shard) == CODE[Reason.easy]
                yield _where(tie, groups, shard.hash, weight(shard))

        include = [low << _HASH_BITS for low in found.include]
        exclude = [low << _HASH_BITS for low in found.exclude]
        before, at = found.before, found.at
        if tied.any():
            among = self._descend(hashes, np.where(tied, wanted - before[1], 0.0), _HASH_BITS)
            for place in np.flatnonzero(tied):
                include[place], exclude[place] = (
                    (found.include[place] << _HASH_BITS) + low for low in (among.include[place], among.exclude[place])
                )
            before, at = before + among.before, np.where(tied, among.at, at)
        return _Crossing(include, exclude, before, at)

    def _descend(self, pieces: Callable[[], Iterable[Piece]], wanted: Floats, bits: int) -> _Crossing:
        """Where the weight of words of `bits` bits crosses `wanted` [G], digit by digit from the highest.

        A group is decided when it is exact, or one record is left at the crossing, or words equal in all bits. A group
        that wants nothing keeps nothing, one that wants more than there is keeps everything.
        """
        count = len(wanted)
        include, exclude = [1 << bits] * count, [1 << bits] * count
        before, at = np.zeros((2, count), np.int64), np.zeros((2, count), np.int64)
        prefix = np.zeros(count, np.uint64)
        open_, done = np.flatnonzero(wanted > 0), 0
        while len(open_) and done < bits:
            width = min(_DIGIT_BITS, bits - done, max(1, (_BINS // len(open_)).bit_length() - 1))
            cell = np.full(count, -1)
            cell[open_] = np.arange(len(open_))
            table = np.zeros((2, len(open_) << width), np.int64)
            rest = bits - done - width
            for group, word, weight in pieces():
                leading = word.astype(np.uint64) >> np.uint64(rest)
                inside = cell[group] >= 0
                if done:
                    inside &= (leading >> np.uint64(width)) == prefix[group]
                group, leading, weight = _where(inside, group, leading, weight)
                digit = (leading & np.uint64((1 << width) - 1)).astype(np.int64)
                _add(table, (cell[group] << width) + digit, weight)
            tables = self.sum_over_ranks(table).reshape(2, len(open_), -1)
            for row, place in enumerate(open_):
                bin_, above, inside_bin = _crossed(tables[:, row], wanted[place] - before[1, place])
                low = (int(prefix[place]) << width) + bin_
                prefix[place], at[:, place] = max(low, 0), inside_bin
                before[:, place] += above
                include[place], exclude[place] = low << rest, (low + 1) << rest
                if not inside_bin[0]:
                    include[place] = exclude[place]
            open_, done = open_[at[0, open_] > 1], done + width
        return _Crossing(include, exclude, before, at)


def _crossed(table: Integers, wanted: float) -> tuple[int, Integers, Integers]:
    """The bin of `table` [2, bins] in which weight counted from the last bin down passes `wanted`; documents and
    weight above it, and in it: none in it where it is exact without. Bin -1 where there is no more than is wanted.
    """
    from_here = np.cumsum(table[:, ::-1], 1)[:, ::-1]
    bin_ = int((from_here[1] > wanted).sum()) - 1
    above = from_here[:, bin_] - table[:, bin_] if bin_ >= 0 else from_here[:, 0]
    return bin_, above, np.zeros(2, np.int64) if above[1] == wanted or bin_ < 0 else table[:, bin_]


def _settle(crossing: _Crossing, wanted: Floats, domain: Integers, domains: int) -> tuple[ThresholdKeys, Integers]:
    """Choose for every group whether its records at the crossing stay; keys, and documents and weight kept [2, D].

    What rounding leaves over in one group of a domain is carried to the next, from long records to short ones: the
    domain ends within half the weight of its largest such record. When in doubt, keep: a domain must not vanish.
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


def check_shard(shard: ShardScores, domains: int) -> None:
    """Raise `DataError` for a shard whose arrays cannot be right."""
    arrays = (shard.score, shard.domain, shard.length, shard.weight, shard.hash)
    if len({len(array) for array in arrays}) != 1:
        raise DataError(f"shard {shard.name}: its columns have {[len(array) for array in arrays]} rows")
    if not len(shard.score):
        return
    if shard.domain.min() < 0 or shard.domain.max() >= domains:
        raise DataError(f"shard {shard.name}: a domain's index lies outside [0, {domains})")
    if shard.weight.min() < 0 or shard.length.min() < 0:
        raise DataError(f"shard {shard.name}: a weight or a length is negative")


def _where(mask: NDArray[np.bool_], *arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    return tuple(array[mask] for array in arrays)


def _add(table: Integers, place: Integers, weight: Integers) -> None:
    """Add documents and weight at `place` to `table` [2, ...]."""
    np.add.at(table[0], place, 1)
    np.add.at(table[1], place, weight)
