"""Find pictures that look alike by perceptual hashes, and keep documents that share pictures together.

The hash is the DCT hash of Zauner (Implementation and Benchmarking of Perceptual Image Hash Functions, 2010), without
its blur: averaging to 32 x 32 does that. Pairs are found by multi-index hashing (Norouzi et al., Fast Search in Hamming
Space with Multi-Index Hashing, 2012).

Shapes: H different hashes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from data.filter.config import FARTHEST

_SIDE, _BITS, _BANDS = 32, 64, 4
_BAND_BITS = _BITS // _BANDS
_BITS_OF = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.uint8)
_PAIRS = 2**20
"""Pairs that are compared at once, but for those of one hash."""
_COLOUR_CELLS = 8
COLOUR_BYTES = 3 * _COLOUR_CELLS**2


def perceptual_hash(picture: Any) -> int:
    """Return the 64-bit hash of a picture: grey or RGB, [height, width] or [height, width, channels], any number type.

    Hashes of a picture in another size, quality or brightness differ in few bits, of unrelated pictures in about 32.
    Pictures of a single colour have the hash 0.
    """
    return _hash(_shrunk(picture))


def hash_and_colours(picture: Any) -> tuple[int, bytes]:
    """Return the perceptual hash of an RGB picture, and its mean colours in a grid of 8 x 8 cells, row by row.

    The hash knows no colours, and little of pictures with large plain parts. The colours tell these apart.
    """
    small = _shrunk(picture)
    size = _SIDE // _COLOUR_CELLS
    cells = small.reshape(_COLOUR_CELLS, size, _COLOUR_CELLS, size, 3).mean((1, 3))
    return _hash(small), np.rint(cells).astype(np.uint8).tobytes()


def _shrunk(picture: Any) -> NDArray[np.float64]:
    """Return the averages of 32 x 32 cells, [32, 32, channels]."""
    pixels = np.asarray(picture)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return _averages(_averages(pixels).swapaxes(0, 1)).swapaxes(0, 1)


def _hash(small: NDArray[np.float64]) -> int:
    grey = small[..., :3] @ [0.299, 0.587, 0.114] if small.shape[2] >= 3 else small[..., 0]
    waves = np.cos(np.pi * np.outer(np.arange(1, 9), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
    strengths = np.round(waves @ grey @ waves.T, 6)  # so that the rounding of a flat picture sets no bit
    return int.from_bytes(np.packbits(strengths > np.median(strengths)).tobytes(), "big")


def _averages(pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Shrink or stretch the first axis to 32 averages, in strips: a large picture as floats needs gigabytes."""
    size = len(pixels)
    edges = [(place * size // _SIDE, -(-(place + 1) * size // _SIDE)) for place in range(_SIDE)]
    return np.stack([pixels[start:end].mean(0, dtype=np.float64) for start, end in edges])


def near_duplicates(hashes: Sequence[int] | NDArray[np.uint64], distance: int = 6) -> list[list[int]]:
    """Return groups of indices whose hashes differ in at most `distance` bits, directly or through others in the group.

    Groups have at least two members and are in ascending order. Two hashes that are that close agree up to
    `distance // 4` bits in one of four bands of 16 bits, so only such pairs are compared.
    """
    if not 0 <= distance <= FARTHEST:
        raise ConfigError("distance", distance, f"must be from 0 to {FARTHEST}")
    hashes_H, where = np.unique(np.array(hashes, np.uint64), return_inverse=True)
    groups_H = np.arange(len(hashes_H))
    for first, second in _candidates(hashes_H, distance // _BANDS):
        near = set_bits(hashes_H[first] ^ hashes_H[second]) <= distance
        join_pairs(groups_H, first[near], second[near])
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups_H[where].tolist()):
        members[group].append(index)
    return [group for group in members.values() if len(group) > 1]


def _candidates(hashes_H: NDArray[np.uint64], most: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yield blocks of the pairs that differ in at most `most` bits of a band."""
    flips = [bits for count in range(most + 1) for bits in combinations(range(_BAND_BITS), count)]
    for band in range(_BANDS):
        keys = (hashes_H >> np.uint64(band * _BAND_BITS)).astype(np.uint16)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for bits in flips:
            wanted = keys ^ np.uint16(sum(1 << bit for bit in bits))
            starts, ends = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
            starts = np.maximum(starts, np.arange(len(keys)) + 1)  # each pair once
            counts = np.maximum(ends - starts, 0)
            blocks = np.cumsum(counts) // _PAIRS
            for rows in np.split(np.arange(len(keys)), np.flatnonzero(np.diff(blocks)) + 1):
                found = counts[rows]
                within = np.arange(found.sum()) - np.repeat(np.cumsum(found) - found, found)
                yield order[np.repeat(rows, found)], order[np.repeat(starts[rows], found) + within]


def set_bits(values_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Count the bits of each value that are set, by a table of 16 bits: numpy 1 has no function for it."""
    return _BITS_OF[values_N.view(np.uint16).reshape(-1, _BITS // 16)].sum(1, dtype=np.int64)


def join_pairs(groups_H: NDArray[np.intp], first: NDArray[np.intp], second: NDArray[np.intp]) -> None:
    """Give the members of each pair the same group: the least member that they are connected to."""
    while True:
        one, other = groups_H[first], groups_H[second]
        apart = one != other
        if not apart.any():
            return
        np.minimum.at(groups_H, np.maximum(one, other)[apart], np.minimum(one, other)[apart])
        while (groups_H[groups_H] != groups_H).any():
            groups_H[:] = groups_H[groups_H]


def shared_origins(pictures: Sequence[Sequence[str]]) -> list[str | None]:
    """Return for each document, given the digests of its pictures, the digest that decides whether it is held out.

    Documents that share a picture, directly or through others, have the same, so no picture lands on both sides of the
    split. None for a document without pictures.
    """
    first: dict[str, int] = {}
    pairs = [(first.setdefault(digest, index), index) for index, digests in enumerate(pictures) for digest in digests]
    groups = np.arange(len(pictures))
    join_pairs(groups, *np.array(pairs, np.intp).reshape(-1, 2).T)
    least: dict[int, str] = {}
    for root, digests in zip(groups.tolist(), pictures, strict=True):
        least[root] = min([*digests, *([least[root]] if root in least else [])], default="")
    return [least[root] or None for root in groups.tolist()]
