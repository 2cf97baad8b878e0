"""Find exact and near-duplicates, and decide which of them is kept.

`signatures` runs by shard on any number of ranks; `find_duplicates` runs once over all of them. Near-duplicates are
found by MinHash (Broder 1997) over word n-grams of length `SHINGLE`. The fraction of matching positions in two
signatures estimates the Jaccard similarity J, with a standard error of sqrt(J (1 - J) / PLACES): 0.035 at J = 0.8.
Two records are compared if their signatures agree in a whole band of positions (Leskovec, Rajaraman & Ullman, Mining of
Massive Datasets, section 3.4). They are joined if the estimate reaches the threshold, and a chain of such pairs forms
one group. The hashing is our own, so that stored signatures survive a change of library.

Every rank holds all signatures. A million records take 1.7 GB if near-duplicates are searched for, 0.65 GB for exact
duplicates only, and nothing without either. A larger input must be filtered in parts; duplicates across parts are not
found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.filter.config import DuplicateConfig
from data.filter.input.records import Reason
from data.filter.screen.normalise import canonical, words

PLACES = 128
SHINGLE = 5
"""Words per n-gram. Texts with fewer words are checked for exact duplicates only."""
_MAX_MISSED = 0.01
"""Allowed probability of missing a pair whose similarity is exactly the threshold. It decides the bands."""
_BLOCK = 1 << 10
_ODD_64 = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Signatures:
    """Signatures of N records. `exact_N2`: 128-bit hash of the canonical text. `near_NP`: the PLACES minima of MinHash.
    `near_possible_N`: false for a record with too few words, whose minima are all 0.
    """

    exact_N2: NDArray[np.uint64]
    near_NP: NDArray[np.uint32]
    near_possible_N: NDArray[np.bool_]


def signatures(texts: Sequence[str], pictures: Sequence[Sequence[str]] | None = None) -> Signatures:
    """Return the signatures of texts, the same on every machine. `pictures`: the digests of each record's pictures.
    Records with pictures are exact duplicates only with the same pictures in the same order, and never near-duplicates
    by their text: captions of different pictures may be equal.
    """
    exact = np.zeros((len(texts), 2), np.uint64)
    near = np.zeros((len(texts), PLACES), np.uint32)
    possible = np.zeros(len(texts), np.bool_)
    factors, offsets = _permutations()
    for row, text in enumerate(texts):
        digests = pictures[row] if pictures is not None else ()
        content = "\0".join([canonical(text), *digests])
        exact[row] = np.frombuffer(xxhash.xxh3_128_digest(content.encode("utf-8", "surrogatepass")), ">u8")
        if digests:
            continue
        runs = np.unique(ngram_hashes(words(text), SHINGLE))
        if len(runs):
            possible[row] = True
            near[row] = _minima((runs >> np.uint64(32)).astype(np.uint32), factors, offsets)
    return Signatures(exact, near, possible)


def ngram_hashes(found: Sequence[str], length: int) -> NDArray[np.uint64]:
    """Return the hash of each n-gram of `length` words, in order; empty for fewer words."""
    count = len(found) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    digest = xxhash.xxh3_64_intdigest
    each = np.fromiter((digest(word.encode("utf-8", "surrogatepass")) for word in found), np.uint64, len(found))
    total = np.zeros(count, np.uint64)
    for place in range(length):
        total = (total ^ (total >> np.uint64(31))) * _ODD_64 + each[place : count + place]
    total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return total ^ (total >> np.uint64(27))


@dataclass(frozen=True)
class Copy:
    """Why a duplicate is dropped. `of`: the record that is kept, as an index over all records in (shard, row) order."""

    reason: Reason
    of: int


def find_duplicates(shards: Sequence[Signatures], config: DuplicateConfig) -> list[list[Copy | None]]:
    """Find the duplicates in all shards. The first record of a group in (shard, row) order is kept (None).

    A record is a `duplicate` if an earlier record has the same canonical text, and a `near_duplicate` if only
    similarity joins it to its group.
    """
    count = sum(len(shard.exact_N2) for shard in shards)
    is_exact, groups = np.zeros(count, np.bool_), DisjointSets(count)
    if count and config.exact:
        for first, second in _exact_copies(np.concatenate([shard.exact_N2 for shard in shards])):
            is_exact[second] = True
            groups.join(first, second)
    if count and config.near is not None:
        near = np.concatenate([shard.near_NP for shard in shards])
        rows = np.flatnonzero(np.concatenate([shard.near_possible_N for shard in shards]) & ~is_exact)
        for first, second in _near_copies(near[rows], config.near):
            groups.join(int(rows[first]), int(rows[second]))
    copies = (
        None if first == row else Copy(Reason.duplicate if is_exact[row] else Reason.near_duplicate, first)
        for row, first in enumerate(map(groups.first, range(count)))
    )
    return [list(islice(copies, len(shard.exact_N2))) for shard in shards]


def bands(threshold: float) -> tuple[int, int]:
    """Return the number and the width of the bands: the widest bands that miss a pair whose similarity is `threshold`
    with a probability of at most 1%.

    If two signatures agree at each position with probability s, the probability that they agree in no band of width r
    is (1 - s^r)^(PLACES / r).
    """
    for width in range(PLACES, 1, -1):
        if (1 - threshold**width) ** (PLACES // width) <= _MAX_MISSED:
            return PLACES // width, width
    return PLACES, 1


class DisjointSets:
    """Union-find whose root is the smallest member, so the order of joining does not matter."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def first(self, row: int) -> int:
        parent = self._parent
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self._parent[high] = low


def _exact_copies(exact_N2: NDArray[np.uint64]) -> Iterable[tuple[int, int]]:
    """Return a pair (first, later) for each record that repeats an earlier one."""
    order = np.lexsort((exact_N2[:, 1], exact_N2[:, 0]))  # stable: equal rows stay in order
    new = np.r_[True, (exact_N2[order][1:] != exact_N2[order][:-1]).any(1)]
    first = order[new][np.cumsum(new) - 1]
    return zip(first[~new].tolist(), order[~new].tolist(), strict=True)


def _near_copies(near_NP: NDArray[np.uint32], threshold: float) -> Iterable[tuple[int, int]]:
    """Yield enough pairs to connect all records that agree in a band and whose estimated similarity is high enough.

    A record of a bucket is compared only with the records that no pair has reached yet. So a bucket of duplicates takes
    time linear in its size, and the connected groups do not depend on the order.
    """
    count, width = bands(threshold)
    needed = int(np.ceil(threshold * PLACES - 1e-9))
    for band in range(count):
        for bucket in _buckets(near_NP[:, band * width : (band + 1) * width]):
            unreached = bucket
            while len(unreached) > 1:
                reached, unreached = [unreached[0]], unreached[1:]
                while reached and len(unreached):
                    record = reached.pop()
                    near = (near_NP[unreached] == near_NP[record]).sum(1) >= needed
                    yield from ((int(record), int(other)) for other in unreached[near])
                    reached.extend(unreached[near])
                    unreached = unreached[~near]


def _buckets(columns_NW: NDArray[np.uint32]) -> Iterable[NDArray[np.intp]]:
    """Yield the indices of each group of two or more rows with the same hash over all columns."""
    keys = np.zeros(len(columns_NW), np.uint64)
    for column_N in columns_NW.T:
        keys = (keys ^ (keys >> np.uint64(31))) * _ODD_64 + column_N
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
    ends = np.r_[starts[1:], len(order)]
    several = ends - starts > 1
    for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
        yield order[start:end]


def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return factors a and offsets b, the same on every machine. With odd a, h -> a h + b mod 2^32 is a bijection."""
    numbers = [xxhash.xxh3_64_intdigest(f"signature {place}".encode()) for place in range(PLACES)]
    return (
        np.array([(number >> 32) | 1 for number in numbers], np.uint32),
        np.array([number & 0xFFFFFFFF for number in numbers], np.uint32),
    )


def _minima(
    runs_R: NDArray[np.uint32], factors_P: NDArray[np.uint32], offsets_P: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """Return the smallest hash under each of the P permutations. Works in blocks that fit the CPU cache."""
    lowest = np.full(len(factors_P), 0xFFFFFFFF, np.uint32)
    for start in range(0, len(runs_R), _BLOCK):
        block = runs_R[start : start + _BLOCK]
        np.minimum(lowest, (factors_P[:, None] * block + offsets_P[:, None]).min(1), out=lowest)
    return lowest
