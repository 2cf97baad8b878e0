"""Find documents whose pictures earlier documents have already.

A picture repeats an earlier one if their perceptual hashes are near and their colours are close (`data.images.phash`).
Measured on generated scenes and glyphs with the default of 8 bits: 99% of resized pictures are found, 88% of smaller
JPEGs, 76% of JPEGs of quality 40 (62% of scenes, whose grounds are plain), and 99% and 96% of pictures that lost 1% or
2% at each border. Of 1,200 different pictures at most 2 are taken for copies: plain grounds of one colour with one
small thing at the same place. By the hashes alone, all pictures of one colour would be.

Shapes: P pictures of all records.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from data.filter.input.records import Reason, RecordPicture
from data.images.phash import COLOUR_BYTES, near_duplicates, set_bits

_APART = 0.25
"""Largest mean difference of the colours of two pictures, as a fraction of how far the colours of a picture are from
their mean. Cutting 2% at each border gives at most 0.22, and most different pictures with near hashes 0.3 or more.
"""


@dataclass(frozen=True)
class Copy:
    """Why a duplicate is dropped. `of`: the index of the document that is kept."""

    reason: Reason
    of: int


def find_picture_duplicates(documents: Iterable[Sequence[RecordPicture]], distance: int) -> list[Copy | None]:
    """Find the documents each of whose pictures an earlier document has that is not such a document itself. To leave a
    document out, omit its pictures.

    `Copy.of` is the document with the first picture. The reason is `duplicate_pictures` if the bytes of all are the
    same, else `near_duplicate_pictures`.
    """
    digests_of: list[list[str]] = []
    hashes, colours = array("Q"), bytearray()
    for pictures in documents:
        digests_of.append([picture.sha256 for picture in pictures])
        hashes.extend(picture.hash for picture in pictures)
        colours += b"".join(picture.colours for picture in pictures)
    colours_PC = np.frombuffer(colours, np.uint8).reshape(-1, COLOUR_BYTES)
    first = iter(_first_alike(np.array(hashes, np.uint64), colours_PC, distance).tolist())
    owners: dict[int, int] = {}
    kept: set[str] = set()
    copies: list[Copy | None] = []
    for row, digests in enumerate(digests_of):
        mine = list(islice(first, len(digests)))
        if mine and owners.keys() >= set(mine):
            exact = kept.issuperset(digests)
            reason = Reason.duplicate_pictures if exact else Reason.near_duplicate_pictures
            copies.append(Copy(reason, owners[mine[0]]))
            continue
        copies.append(None)
        kept.update(digests)
        for one in mine:
            owners.setdefault(one, row)
    return copies


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
