"""Find pictures that look alike by perceptual hashes, and keep documents that share pictures together.

The hash is the DCT hash of Zauner (Implementation and Benchmarking of Perceptual Image Hash Functions, 2010), without
its blur: averaging to 32 x 32 does that. Pairs are found by multi-index hashing (Norouzi et al., Fast Search in Hamming
Space with Multi-Index Hashing, 2012).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from data.filter.screen.duplicates import DisjointSets

_SIDE, _BITS, _BANDS = 32, 64, 4
_BAND_BITS = _BITS // _BANDS
FARTHEST = 3 * _BANDS - 1
"""Largest distance that can be searched: at most two bits of a band may differ."""


def perceptual_hash(picture: Any) -> int:
    """Return the 64-bit hash of a picture: grey or RGB, [height, width] or [height, width, channels], any number type.

    Hashes of a picture in another size, quality or brightness differ in few bits, of unrelated pictures in about 32.
    Pictures of a single colour have the hash 0.
    """
    pixels = np.asarray(picture)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    small = _averages(_averages(pixels).swapaxes(0, 1)).swapaxes(0, 1)
    grey = small[..., :3] @ [0.299, 0.587, 0.114] if small.shape[2] >= 3 else small[..., 0]
    waves = np.cos(np.pi * np.outer(np.arange(1, 9), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
    strengths = np.round(waves @ grey @ waves.T, 6)  # so that the rounding of a flat picture sets no bit
    return int.from_bytes(np.packbits(strengths > np.median(strengths)).tobytes(), "big")


def _averages(pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Shrink or stretch the first axis to 32 averages, in strips: a large picture as floats needs gigabytes."""
    size = len(pixels)
    edges = [(place * size // _SIDE, -(-(place + 1) * size // _SIDE)) for place in range(_SIDE)]
    return np.stack([pixels[start:end].mean(0, dtype=np.float64) for start, end in edges])


def near_duplicates(hashes: Sequence[int], distance: int = 6) -> list[list[int]]:
    """Return groups of indices whose hashes differ in at most `distance` bits, directly or through others in the group.

    Groups have at least two members and are in ascending order. Two hashes that are that close agree up to
    `distance // 4` bits in one of four bands of 16 bits, so only such pairs are compared.
    """
    if not 0 <= distance <= FARTHEST:
        raise ConfigError("distance", distance, f"must be from 0 to {FARTHEST}")
    groups = DisjointSets(len(hashes))
    flips = [bits for count in range(distance // _BANDS + 1) for bits in combinations(range(_BAND_BITS), count)]
    changes = [sum(1 << bit for bit in bits) for bits in flips]
    first: dict[int, int] = {}
    bands: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(_BANDS)]
    for index, value in enumerate(hashes):
        if value in first:
            groups.join(first[value], index)
            continue
        for number, band in enumerate(bands):
            key = value >> number * _BAND_BITS & (1 << _BAND_BITS) - 1
            for change in changes:
                for other in band.get(key ^ change, ()):
                    if (value ^ other).bit_count() <= distance:
                        groups.join(first[other], index)
            band[key].append(value)
        first[value] = index
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(hashes)):
        members[groups.first(index)].append(index)
    return [group for group in members.values() if len(group) > 1]


def shared_origins(pictures: Sequence[Sequence[str]]) -> list[str | None]:
    """Return for each document, given the digests of its pictures, the digest that decides whether it is held out.

    Documents that share a picture, directly or through others, have the same, so no picture lands on both sides of the
    split. None for a document without pictures.
    """
    groups = DisjointSets(len(pictures))
    first: dict[str, int] = {}
    for index, digests in enumerate(pictures):
        for digest in digests:
            groups.join(first.setdefault(digest, index), index)
    least: dict[int, str] = {}
    for index, digests in enumerate(pictures):
        root = groups.first(index)
        least[root] = min([*digests, *([least[root]] if root in least else [])], default="")
    return [least[groups.first(index)] or None for index in range(len(pictures))]
