"""Find what a rank needs in an index that is in parts, so that no rank reads all parts.

The ranks divide the parts among them. Each verifies its own and says in a table which of them holds which blocks; all
tables together have 44 bytes for each shard. Then a rank reads the parts with blocks that it needs. If the layout is
that of the save, there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray

from parallel.comm import tree
from train.checkpoint.index import Damaged, IndexedTensor, join_parts, parts_of, read_index, read_part
from train.checkpoint.state import TensorShard

_DIMS = 2
"""Leading dimensions in which blocks are compared. Blocks that differ in others only are read in vain."""
_ROW = np.dtype([("tensor", np.uint64), ("part", np.uint32), ("low", np.int64, _DIMS), ("high", np.int64, _DIMS)])
"""The hash of a tensor's name, the number of the part, and a block's begin and end."""
Table = NDArray[Any]


def needed_index(checkpoint: Path, state: Sequence[TensorShard], group: dist.ProcessGroup) -> dict[str, IndexedTensor]:
    """Return the entries of the index that overlap the blocks of `state`, and perhaps others.

    All ranks call this with their own state; `group` is a gloo group of all. Raises `Damaged` or `OSError` on every
    rank if a part is damaged or cannot be read, whichever rank needs it.
    """
    names, own, table = list[str](), dict[int, dict[str, IndexedTensor]](), np.empty(0, _ROW)
    failure: Exception | None = None
    try:
        names = parts_of(checkpoint)
        numbers = range(dist.get_rank(), len(names), dist.get_world_size())
        own = {number: read_part(checkpoint, names[number]) for number in numbers}
        table = np.concatenate([table, *(_rows(number, part) for number, part in own.items())])
    except (Damaged, OSError) as error:
        failure = error
    gathered = tree.gather((failure, table), group)
    failures = [one for one, _ in gathered if one is not None]
    joined = np.concatenate([one for _, one in gathered]) if gathered and not failures else table
    failure, joined = tree.spread((failures[0] if failures else None, joined), group)
    if failure is not None:
        raise failure
    if not names:
        return read_index(checkpoint)
    needed = overlapping(joined, state)
    return join_parts(own[number] if number in own else read_part(checkpoint, names[number]) for number in needed)


def overlapping(table: Table, state: Sequence[TensorShard]) -> list[int]:
    """Return the numbers of the parts that hold a part of a block of `state`, and one part with each tensor none of
    whose blocks overlaps: its shape has changed, which the reader reports.
    """
    needs: dict[int, tuple[list[int], list[int]]] = {}
    for one in state:
        if one.tensor.numel():
            low, high = _box(one.offset, one.tensor.shape)
            before = needs.get(_hash(one.name), (low, high))
            needs[_hash(one.name)] = [*map(min, low, before[0])], [*map(max, high, before[1])]
    if not needs or not len(table):
        return []
    hashes = np.array(sorted(needs), np.uint64)
    bounds = np.array([needs[int(one)] for one in hashes])
    places = np.minimum(np.searchsorted(hashes, table["tensor"]), len(hashes) - 1)
    known = hashes[places] == table["tensor"]
    hit = known & (table["low"] < bounds[places, 1]).all(1) & (table["high"] > bounds[places, 0]).all(1)
    missed = np.flatnonzero(known & ~np.isin(places, places[hit]))
    _, first = np.unique(places[missed], return_index=True)
    return np.unique(np.concatenate([table["part"][hit], table["part"][missed[first]]])).tolist()


def _rows(number: int, part: Mapping[str, IndexedTensor]) -> Table:
    found = [
        (_hash(name), number, *_box(shard.offset, shard.shape))
        for name, tensor in part.items()
        for shard in tensor.shards
    ]
    return np.array(found, _ROW)


def _box(offset: Sequence[int], shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return begin and end of a block in the leading dimensions; a missing dimension has one element."""
    missing = max(0, _DIMS - len(shape))
    low = [*offset[:_DIMS], *[0] * missing]
    return low, [a + b for a, b in zip(low, [*shape[:_DIMS], *[1] * missing], strict=True)]


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())
