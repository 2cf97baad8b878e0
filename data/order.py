"""Which sample comes when, as pure functions with random access: no shuffle buffer, no table, no state.

`permute` is a keyed bijection; `Blend` says which source the n-th sample of a run comes from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_SCALE = 1 << 40
"""Weights are fixed-point integers, so that shares are exact over any number of samples."""


def key_of(*parts: object) -> int:
    """A 64-bit key from what must change it."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """A bijection of range(size), chosen by `key`, applied to each index.

    A balanced Feistel network over the smallest even number of bits that holds `size`; what falls outside walks on
    until it is inside (Black & Rogaway 2002, section 4). On average fewer than four walks.
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
    """SplitMix64's finaliser of value and key (Steele et al. 2014)."""
    z = value * np.uint64(0xD1342543DE82EF95) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Blend:
    """Weighted choice of a source for every sample ordinal.

    After any number of whole blocks each source has got its share of the samples within one. Inside a block the key
    says which source comes when; each source gives its own samples in order, so that its epochs end cleanly.
    """

    block = 1024

    def __init__(self, weights: Mapping[str, float], key: int) -> None:
        self.names = tuple(weights)
        self.key = key
        total = sum(weights.values())
        bounds = np.cumsum([0.0, *weights.values()]) / total
        self._bounds = [round(bound * _SCALE) for bound in bounds]

    def locate(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each sample ordinal: index of its source, and how many samples that source has given before it."""
        source, within = np.empty_like(ordinals), np.empty_like(ordinals)
        for block in np.unique(ordinals // self.block):
            here = ordinals // self.block == block
            sources, ordinals_within = self._block(int(block))
            offset = ordinals[here] % self.block
            source[here], within[here] = sources[offset], ordinals_within[offset]
        return source, within

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of every sample in a block, and its place among that source's samples."""
        before, after = self._given(block * self.block), self._given((block + 1) * self.block)
        edges = np.cumsum([0, *(b - a for a, b in zip(before, after, strict=True))])
        place = permute(np.arange(self.block), self.block, key_of(self.key, block))
        source = np.searchsorted(edges, place, side="right") - 1
        by_source = np.argsort(source, kind="stable")
        within = np.empty(self.block, np.int64)
        within[by_source] = np.arange(self.block) - edges[source[by_source]] + np.asarray(before)[source[by_source]]
        return source, within

    def _given(self, samples: int) -> list[int]:
        """Samples of each source among the first `samples`; they add up exactly. Python integers: no overflow."""
        ends = [samples * bound // _SCALE for bound in self._bounds]
        return [b - a for a, b in pairwise(ends)]
