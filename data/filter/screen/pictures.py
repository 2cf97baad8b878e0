"""Find documents whose pictures earlier documents have already.

A picture repeats an earlier one if their perceptual hashes are near and their colours are close (`data.images.phash`).
Measured on generated scenes and glyphs with the default of 8 bits: 99% of resized pictures are found, 88% of smaller
JPEGs, 76% of JPEGs of quality 40 (62% of scenes, whose grounds are plain), and 99% and 96% of pictures that lost 1% or
2% at each border. Of 1,200 different pictures at most 2 are taken for copies: plain grounds of one colour with one
small thing at the same place. By the hashes alone, all pictures of one colour would be.

Shapes: N records of a shard, P pictures of all records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from data.filter.input.records import Reason
from data.images.phash import COLOUR_BYTES, near_duplicates, set_bits

_APART = 0.25
"""Largest mean difference of the colours of two pictures, as a fraction of how far the colours of a picture are from
their mean. Cutting 2% at each border gives at most 0.22, and most different pictures with near hashes 0.3 or more.
"""


@dataclass(frozen=True)
class PictureSignatures:
    """Pictures of a shard, in order. `counts_N`: the number of each record, 0 to leave it out. `sha256`: of the bytes.
    `hashes`: uint64. `colours`: uint8, `COLOUR_BYTES` each.
    """

    counts_N: NDArray[np.int64]
    sha256: Sequence[str]
    hashes: NDArray[np.uint64]
    colours: NDArray[np.uint8]


@dataclass(frozen=True)
class Copy:
    """Why a duplicate is dropped. `of`: the record that is kept, as an index over all records in (shard, row) order."""

    reason: Reason
    of: int


def find_picture_duplicates(shards: Sequence[PictureSignatures], distance: int) -> list[list[Copy | None]]:
    """Find the documents each of whose pictures an earlier document has that is not such a document itself.

    `Copy.of` is the document with the first picture. The reason is `duplicate_pictures` if the bytes of all are the
    same, else `near_duplicate_pictures`.
    """
    hashes = np.concatenate([shard.hashes for shard in shards]) if shards else np.zeros(0, np.uint64)
    colours = np.concatenate([shard.colours for shard in shards]) if shards else np.zeros((0, COLOUR_BYTES), np.uint8)
    first_P = _first_alike(hashes, colours, distance).tolist()
    digests = [digest for shard in shards for digest in shard.sha256]
    owners: dict[int, int] = {}
    kept: set[str] = set()
    copies: list[Copy | None] = []
    begin = 0
    for row, count in enumerate(count for shard in shards for count in shard.counts_N.tolist()):
        mine, own = first_P[begin : begin + count], digests[begin : begin + count]
        begin += count
        if count and all(one in owners for one in mine):
            exact = all(digest in kept for digest in own)
            reason = Reason.duplicate_pictures if exact else Reason.near_duplicate_pictures
            copies.append(Copy(reason, owners[mine[0]]))
            continue
        copies.append(None)
        kept.update(own)
        for one in mine:
            owners.setdefault(one, row)
    left = iter(copies)
    return [list(islice(left, len(shard.counts_N))) for shard in shards]


def _first_alike(hashes: NDArray[np.uint64], colours: NDArray[np.uint8], distance: int) -> NDArray[np.intp]:
    """Return for each picture the first that it repeats, or itself."""
    first_P = np.arange(len(hashes))
    for group in near_duplicates(hashes, distance):
        different = [0]
        bits, cells = hashes[group], colours[group].astype(np.float32).reshape(len(group), -1, 3)
        spread = np.abs(cells - cells.mean(1, keepdims=True)).mean((1, 2))
        for place in range(1, len(group)):
            near = set_bits(bits[different] ^ bits[place]) <= distance
            apart = np.abs(cells[different] - cells[place]).mean((1, 2))
            alike = np.flatnonzero(near & (apart <= _APART * (1 + (spread[different] + spread[place]) / 2)))
            if len(alike):
                first_P[group[place]] = group[different[int(alike[0])]]
            else:
                different.append(place)
    return first_P
