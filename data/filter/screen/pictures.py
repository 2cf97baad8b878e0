"""Find documents whose pictures earlier documents have already.

Pictures with near perceptual hashes form groups (`data.images.phash`), as near-duplicate texts do. Inside a group a
picture repeats the first one with nearly the same colours. Measured on generated scenes and glyphs, with the default of
8 bits: of pictures that lost 1% or 2% at each border 99% and 94% are found, resized and re-encoded ones always, and no
other picture in 220,000 pairs; without the colours 4 pairs, and all pictures of one colour.

Shapes: N records of a shard, P pictures of all records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from data.filter.input.records import Reason
from data.filter.screen.duplicates import Copy
from data.images.phash import COLOUR_BYTES, near_duplicates

_LEVELS = 8
"""Largest mean difference of the colours, in grey levels. Cutting 2% at each border changes them by at most 5; of
different pictures with near hashes they differ by 15 or more.
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
        different = [group[0]]
        for picture in group[1:]:
            apart = np.abs(colours[different].astype(np.int16) - colours[picture]).mean(1)
            alike = np.flatnonzero(apart <= _LEVELS)
            if len(alike):
                first_P[picture] = different[int(alike[0])]
            else:
                different.append(picture)
    return first_P
