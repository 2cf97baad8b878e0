"""Choose the order of samples with pure functions and random access: no shuffle buffer, no table, no state.

`permute` is a keyed bijection. `Blend` says which source each sample of a phase comes from.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_SCALE = 1 << 40
"""Weights are fixed-point integers in units of 1 / `_SCALE`, so counts are exact over any number of samples."""
_BLOCK = 1024
_LARGEST_BLOCK = 1 << 20


def key_of(*parts: object) -> int:
    """Hash the parts to a 64-bit key."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Apply a bijection of range(size), chosen by `key`, to each index.

    Uses a balanced Feistel network over the smallest even number of bits that holds `size`. Results outside the range
    are permuted again (cycle walking; Black & Rogaway 2002, section 4), on average fewer than four times.
    """
    if size < 1 or (len(index) and (index.min() < 0 or index.max() >= size)):
        raise ValueError(f"indices must lie in [0, {size})")
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    result = _feistel(index.astype(np.uint64), half, key)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, key)
    return result.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half: int, key: int) -> NDArray[np.uint64]:
    mask = np.uint64((1 << half) - 1)
    left, right = value >> np.uint64(half), value & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(right, (key + number * 0x9E3779B97F4A7C15) % (1 << 64)) & mask)
    return (left << np.uint64(half)) | right


def _mix(value: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Apply SplitMix64's finaliser to value and key (Steele et al. 2014)."""
    z = value * np.uint64(0xD1342543DE82EF95) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class BlockShares:
    """Choose the source of every sample of an endless blend with fixed weights.

    After any number of whole blocks, each source's number of samples differs from its exact fraction by less than one.
    Inside a block the key chooses the order of sources. The samples of one source come in order.
    """

    def __init__(self, weights: Sequence[float], key: int) -> None:
        self.key = key
        bounds = np.cumsum([0.0, *weights]) / sum(weights)
        self._bounds = [round(bound * _SCALE) for bound in bounds]
        self.block = _BLOCK
        # a count, a difference of rounded ends, could fall from block to block unless each has a sample of the source
        inner = [end - begin for begin, end in pairwise(self._bounds)][1:-1]
        while any(share and share * self.block < _SCALE for share in inner) and self.block < _LARGEST_BLOCK:
            self.block *= 2

    def at(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of every sample in a block, and the sample's index among those of its source."""
        before, after = self.counts(block), self.counts(block + 1)
        edges = np.cumsum([0, *(b - a for a, b in zip(before, after, strict=True))])
        place = permute(np.arange(self.block), self.block, key_of(self.key, block))
        source = np.searchsorted(edges, place, side="right") - 1
        by_source = np.argsort(source, kind="stable")
        within = np.empty(self.block, np.int64)
        within[by_source] = np.arange(self.block) - edges[source[by_source]] + np.asarray(before)[source[by_source]]
        return source, within

    def counts(self, blocks: int) -> list[int]:
        """Count the samples of each source in the first `blocks` blocks, exactly (Python integers do not overflow)."""
        ends = [blocks * self.block * bound // _SCALE for bound in self._bounds]
        return [b - a for a, b in pairwise(ends)]


@dataclass(frozen=True)
class Exclusion:
    """Tokens [start, stop) of a source's training stream, which no step of the run from `step` on (counted from 0)
    reads. Positions in the stream, unlike numbers of sequences, mean the same in phases of other sequence lengths.
    """

    source: str
    start: int
    stop: int
    step: int

    def sequences(self, seq_len: int) -> tuple[int, int]:
        """Return the first and the last sequence of the stream with one of these tokens."""
        return self.start // seq_len, (self.stop - 1) // seq_len


@dataclass(frozen=True)
class BlendSegment:
    """Samples [begin, end) of a blend, drawn from the same `sources`: those not yet used up. `before`: the number of
    samples of every source of the blend before `begin`.
    """

    begin: int
    end: int | None
    """None: endless."""
    sources: NDArray[np.int64]
    before: NDArray[np.int64]
    shares: BlockShares


@dataclass(frozen=True)
class SampleRange:
    """Consecutive samples from `begin` on: the source of each, and the sample's index among those of its source."""

    begin: int
    sources: NDArray[np.int64]
    within: NDArray[np.int64]


class Blend:
    """Choose the source of every sample, given its ordinal, by the weights of the sources.

    After `limits[name]` samples a source is dropped; the others keep their proportions. The ordinals at which this
    happens are computed once, in exact integer arithmetic. Sources of weight 0 are dropped at the start.
    """

    def __init__(self, weights: Mapping[str, float], key: int, limits: Mapping[str, int] | None = None) -> None:
        weights = {name: weight for name, weight in weights.items() if weight}
        self.names = tuple(weights)
        ends = [(limits or {}).get(name) for name in self.names]
        self.segments: list[BlendSegment] = []
        before = [0] * len(self.names)
        begin: int | None = 0
        while begin is not None:
            alive = [i for i, limit in enumerate(ends) if limit is None or before[i] < limit]
            if not alive:
                break
            # the first segment has the key of a blend without limits, so limits change nothing until one is reached
            own = key if not self.segments else key_of(key, "piece", len(self.segments))
            shares = BlockShares([weights[self.names[i]] for i in alive], own)
            counts = _until_used_up(shares, [None if (n := ends[i]) is None else n - before[i] for i in alive])
            end = None if counts is None else begin + sum(counts)
            self.segments.append(BlendSegment(begin, end, np.array(alive), np.array(before), shares))
            for i, count in zip(alive, counts or (), strict=counts is not None):
                before[i] += count
            begin = end
        self._begins = [segment.begin for segment in self.segments]

    @property
    def samples(self) -> int | None:
        """Number of samples until every source is used up; None: endless."""
        return self.segments[-1].end if self.segments else 0

    def range_around(self, ordinal: int) -> SampleRange:
        """Return the block of samples around `ordinal`. Raises `IndexError` if the sources are used up before it."""
        if ordinal < 0 or (self.samples is not None and ordinal >= self.samples):
            raise IndexError(f"sample {ordinal} lies outside the blend's {self.samples}")
        segment = self._segment(ordinal)
        block = (ordinal - segment.begin) // segment.shares.block
        begin = segment.begin + block * segment.shares.block
        length = None if segment.end is None else segment.end - begin
        source, within = (array[:length] for array in segment.shares.at(block))
        sources = segment.sources[source]
        return SampleRange(begin, sources, within + segment.before[sources])

    def counts(self, samples: int) -> dict[str, int]:
        """Count the samples of each source among the first `samples`. Raises `IndexError` if the blend has fewer."""
        if not samples:
            return dict.fromkeys(self.names, 0)
        here = self.range_around(samples - 1)
        segment = self._segment(samples - 1)
        counts = segment.before + np.bincount(here.sources[: samples - here.begin], minlength=len(self.names))
        counts[segment.sources] += segment.shares.counts((here.begin - segment.begin) // segment.shares.block)
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _segment(self, ordinal: int) -> BlendSegment:
        return self.segments[bisect_right(self._begins, ordinal) - 1]


def _until_used_up(shares: BlockShares, left: Sequence[int | None]) -> list[int] | None:
    """Count each source's samples until a source would exceed the number it has `left`. None if no source has a limit.

    Counts never fall from block to block, so the block where this happens is found by bisection.
    """
    limits = [(i, limit) for i, limit in enumerate(left) if limit is not None]
    if not limits:
        return None

    def exceeds(blocks: int) -> bool:
        counts = shares.counts(blocks)
        return any(counts[i] > limit for i, limit in limits)

    low = bisect_left(range(1 << 62), True, key=exceeds) - 1
    source, within = shares.at(low)
    stop = min(int(np.argmax(over)) for i, n in limits if (over := (source == i) & (within >= n)).any())
    counts = np.bincount(source[:stop], minlength=len(left))
    return [before + int(count) for before, count in zip(shares.counts(low), counts, strict=True)]
