"""Find exact and near-duplicates, and decide which of them is kept.

`signatures` runs by shard; `DuplicateSearch` compares them on disk, spread over the ranks. Near-duplicates are found by
MinHash (Broder 1997) over word n-grams of length `SHINGLE`. The fraction of matching positions in two signatures
estimates the Jaccard similarity J, with a standard error of sqrt(J (1 - J) / PLACES): 0.035 at J = 0.8. Two records are
compared if their signatures agree in a whole band of positions (Leskovec, Rajaraman & Ullman, Mining of Massive
Datasets, section 3.4). They are joined if the estimate reaches the threshold, and a chain of such pairs forms one
group. The hashing is our own, so that stored signatures survive a change of library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.filter.config import DuplicateConfig
from data.filter.runs import DiskArrays, Entries
from data.filter.screen.normalise import canonical, words
from data.images.phash import join_pairs

PLACES = 128
SHINGLE = 5
"""Words per n-gram. Texts with fewer words are checked for exact duplicates only."""
_MAX_MISSED = 0.01
"""Allowed probability of missing a pair whose similarity is exactly the threshold. It decides the bands."""
_BLOCK = 1 << 10
_FETCHED = 1 << 15
"""Signatures in memory while candidates are compared: 16 MiB, and a few times that in temporary arrays."""
_TOGETHER = 16
"""Records of a large bucket that are compared with the others at once, which are then read once for all."""
_JOINED = 1 << 20
"""Pairs that are joined to groups at once."""
_ODD_64 = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Signatures:
    """Signatures of N records. `exact_N2`: 128-bit hash of the canonical text. `near_NP`: the PLACES minima of MinHash,
    all 0 for a record with too few words. `passed_N`: false for a record that is dropped for another reason. It is not
    compared.
    """

    exact_N2: NDArray[np.uint64]
    near_NP: NDArray[np.uint32]
    passed_N: NDArray[np.bool_]


def signatures(texts: Sequence[str], pictures: Sequence[Sequence[str]] | None = None) -> Signatures:
    """Return the signatures of texts, the same on every machine. `pictures`: the digests of each record's pictures.
    Records with pictures are exact duplicates only with the same pictures in the same order, and never near-duplicates
    by their text: captions of different pictures may be equal.
    """
    exact = np.zeros((len(texts), 2), np.uint64)
    near = np.zeros((len(texts), PLACES), np.uint32)
    factors, offsets = _permutations()
    for row, text in enumerate(texts):
        digests = pictures[row] if pictures is not None else ()
        content = "\0".join([canonical(text), *digests])
        exact[row] = np.frombuffer(xxhash.xxh3_128_digest(content.encode("utf-8", "surrogatepass")), ">u8")
        if digests:
            continue
        runs = np.unique(ngram_hashes(words(text), SHINGLE))
        if len(runs):
            near[row] = _minima((runs >> np.uint64(32)).astype(np.uint32), factors, offsets)
    return Signatures(exact, near, np.ones(len(texts), np.bool_))


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


class DuplicateSearch:
    """Find the duplicates among the records of all shards. `signatures`: those of a shard.

    The first record of a group is kept. A record is an exact duplicate if an earlier record has the same canonical
    text, and a near-duplicate if only similarity joins it to its group. Memory does not grow with the number of
    records, except for 16 bytes per record in a pair of near-duplicates while rank 0 joins the pairs to groups.
    """

    def __init__(self, disk: DiskArrays, config: DuplicateConfig, signatures: Callable[[str], Signatures]) -> None:
        self.disk, self.config, self.signatures = disk, config, signatures

    def run(self) -> None:
        """Do the steps that are not done. All processes call it."""
        disk, near = self.disk, self.config.near
        if self.config.exact:
            disk.find_repeats("exact", self._exact_entries)
        if near is None:
            return
        count, width = bands(near)
        needed = int(np.ceil(near * PLACES - 1e-9))
        disk.make("signatures", len(disk.blocks), self._near_signatures)

        def entries(block: int) -> Entries:
            return _band_entries(disk.load("signatures", block), int(disk.starts[block]), count, width)

        def pairs(number: int) -> Entries:
            found = _near_pairs(disk.between("bands", *ranges[number]), self._signatures_of, needed)
            return np.concatenate([np.zeros((2, 0), np.uint64), *found], 1)

        disk.make_runs("bands", entries)
        ranges = disk.ranges(count)
        disk.make("pairs", len(ranges), pairs)
        disk.make("groups", 1, lambda _: _grouped(disk.load_all("pairs")))

    def copies(self, shard: str, rows: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return for each row of a shard the record that is kept in its place (-1: itself), as an index over all
        records, and whether it is an exact duplicate.
        """
        start = self.disk.first[shard]
        of, is_exact = np.full(rows, -1), np.zeros(rows, np.bool_)
        repeats = self._exact_copies(start, rows)
        of[repeats[0] - start], is_exact[repeats[0] - start] = repeats[1], True
        if self.config.near is not None:
            members, firsts = self.disk.load("groups", 0).view(np.int64)
            begin, end = np.searchsorted(members, [start, start + rows])
            of[members[begin:end] - start] = firsts[begin:end]
            place = np.minimum(np.searchsorted(members, of), len(members) - 1)
            if len(members):  # what an exact copy repeats may itself be a near-duplicate
                of = np.where(members[place] == of, firsts[place], of)
        return of, is_exact

    def _exact_copies(self, start: int, rows: int) -> NDArray[np.int64]:
        """Return the pairs (later record, first record) whose later record is one of `rows` from `start` on."""
        if not self.config.exact:
            return np.zeros((2, 0), np.int64)
        return self.disk.between("exact_repeats", start, start + rows - 1).view(np.int64)

    def _exact_entries(self, shard: str) -> Entries:
        found = self.signatures(shard)
        rows = np.flatnonzero(found.passed_N)
        return np.stack([*found.exact_N2[rows].T, (rows + self.disk.first[shard]).astype(np.uint64)])

    def _near_signatures(self, block: int) -> NDArray[np.uint32]:
        """Return the minima of a block. They are 0 for records that are not compared."""
        found = [self.signatures(shard) for shard in self.disk.blocks[block]]
        near = np.concatenate([np.where(one.passed_N[:, None], one.near_NP, 0) for one in found])
        start = int(self.disk.starts[block])
        near[self._exact_copies(start, len(near))[0] - start] = 0
        return near

    def _signatures_of(self, records: Entries) -> NDArray[np.uint32]:
        return self.disk.rows("signatures", records)


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


def _band_entries(near_NP: NDArray[np.uint32], start: int, count: int, width: int) -> Entries:
    """Return a hash of each band of each record and the record, [2, E]."""
    rows = np.flatnonzero(near_NP.any(1))
    bands_RBW = near_NP[rows, : count * width].reshape(len(rows), count, width)
    keys = np.tile(np.arange(count, dtype=np.uint64), (len(rows), 1))
    for place in range(width):
        keys = (keys ^ (keys >> np.uint64(31))) * _ODD_64 + bands_RBW[:, :, place]
    keys = (keys ^ (keys >> np.uint64(32))) * _ODD_64  # ranges of keys need random high bits
    return np.stack([keys.ravel(), np.repeat((rows + start).astype(np.uint64), count)])


def _near_pairs(
    entries: Entries, signatures: Callable[[Entries], NDArray[np.uint32]], needed: int
) -> Iterator[Entries]:
    """Yield enough pairs of records, [2, E], to connect all that share a key and agree in `needed` positions.

    `entries` are sorted. The records with one key, a bucket, are first compared with the first of them. Only if one is
    unlike it, the bucket is searched for further pairs.
    """
    keys, records = entries
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)])
    sizes = np.diff(starts, append=len(keys))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    is_large, window = sizes > _FETCHED, np.cumsum(sizes) // _FETCHED
    cuts = (window[1:] != window[:-1]) | is_large[1:] | is_large[:-1]
    for some in np.split(np.arange(len(sizes)), np.flatnonzero(cuts) + 1) if len(sizes) else ():
        first = np.repeat(np.cumsum(sizes[some]) - sizes[some], sizes[some])
        members = records[np.arange(len(first)) - first + np.repeat(starts[some], sizes[some])]
        if is_large[some[0]]:  # alone
            yield _connected(members, signatures, needed)
            continue
        near = signatures(members)
        alike = (near == near[first]).sum(1) >= needed
        yield np.stack([members[first], members])[:, alike & (first != np.arange(len(first)))]
        for begin in np.unique(first[~alike]).tolist():
            end = int(np.searchsorted(first, begin, "right"))
            if end - begin > 2:
                places = np.arange(begin, end, dtype=np.uint64)
                yield members[_connected(places, near.__getitem__, needed)]


def _connected(unreached: Entries, signatures: Callable[[Entries], NDArray[np.uint32]], needed: int) -> Entries:
    """Return pairs (first, other), [2, E], that connect the records of a bucket whose signatures are alike, directly or
    through others. A record is compared only with those not reached yet, so duplicates take linear time.
    """
    found = [np.zeros((2, 0), np.uint64)]
    while len(unreached) > 1:
        first, reached, unreached = unreached[0], unreached[:1], unreached[1:]
        while len(reached) and len(unreached):
            some, reached = signatures(reached[:_TOGETHER]), reached[_TOGETHER:]
            alike = np.zeros(len(unreached), np.bool_)
            for begin in range(0, len(unreached), _FETCHED):
                others = signatures(unreached[begin : begin + _FETCHED])
                for one in some:
                    alike[begin : begin + _FETCHED] |= (others == one).sum(1) >= needed
            found.append(np.stack([np.full(int(alike.sum()), first, np.uint64), unreached[alike]]))
            reached, unreached = np.concatenate([reached, unreached[alike]]), unreached[~alike]
    return np.concatenate(found, 1)


def _grouped(pairs: Iterable[Entries]) -> Entries:
    """Return (record, first record of its group) for each record with an earlier one in its group, [2, E], sorted."""
    found, pending = np.zeros((2, 0), np.uint64), []
    for some in pairs:
        pending.append(some)
        if sum(one.shape[1] for one in pending) > max(_JOINED, found.shape[1]):
            found, pending = _joined([found, *pending]), []
    return _joined([found, *pending])


def _joined(pairs: Sequence[Entries]) -> Entries:
    members, places = np.unique(np.concatenate(pairs, 1), return_inverse=True)
    groups = np.arange(len(members))
    join_pairs(groups, *places.reshape(2, -1))
    return np.stack([members, members[groups]])[:, groups != np.arange(len(groups))]


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
