"""Sort, group and look up what belongs to records on disk, in memory that does not grow with their number.

Consecutive shards form blocks. Each block has a run: entries that are sorted by key. A range of keys is read from all
runs and handled on its own, which is an external merge sort (Knuth, volume 3, section 5.4) without the last merge.
Every file is an array that one process makes and writes at once. So the results depend neither on the number of
processes nor on kills, and a killed search resumes.

Shapes: E entries of K numbers of 64 bits: the key comes first, the index of the record over all shards last.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.files import remove_tree, write_bytes
from data.filter.store import Workers, barrier, local_items, reading, writing

SORTED = "sorted"
"""Folder of a stage for such files."""
BLOCK_RECORDS = 1 << 16
RANGE_ENTRIES = 1 << 20
"""Mean number of entries of a range of keys. Keys are hashes, so the sizes of ranges differ little."""
Entries = NDArray[np.uint64]


class DiskArrays:
    """Arrays of the records of some shards, as files in a folder that `remove` deletes."""

    def __init__(self, folder: Path, shards: Mapping[str, int], workers: Workers) -> None:
        self.folder, self.workers = folder, workers
        self.count = sum(shards.values())
        self.first = dict(zip(shards, np.cumsum([0, *shards.values()]).tolist(), strict=False))
        """Index of the first record of each shard."""
        self.blocks: list[list[str]] = []
        starts: list[int] = []
        for shard, rows in shards.items():
            if not starts or self.first[shard] + rows - starts[-1] > BLOCK_RECORDS:
                self.blocks.append([])
                starts.append(self.first[shard])
            self.blocks[-1].append(shard)
        self.starts = np.array(starts, np.int64)
        self._made: dict[str, int] = {}

    def make(self, name: str, count: int, array: Callable[[int], NDArray[Any]]) -> None:
        """Store `count` arrays, each made by one process, except those that exist."""
        self._made[name] = count
        with barrier(self.workers):
            for number in local_items(range(count), self.workers):
                path = self._path(name, number)
                if not path.exists():
                    file = io.BytesIO()
                    np.save(file, array(number))
                    with writing(path):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_bytes(path, file.getvalue())

    def load(self, name: str, number: int) -> NDArray[Any]:
        """Map an array into memory. Raises `DataError` if it is damaged."""
        path = self._path(name, number)
        with reading(path, "remove it and run again"):
            found: NDArray[Any] = np.load(path, mmap_mode="r")
            return found

    def load_all(self, name: str) -> Iterator[NDArray[Any]]:
        return (self.load(name, number) for number in range(self._made[name]))

    def make_runs(self, name: str, entries: Callable[[int], Entries]) -> None:
        """Store the entries of each block, sorted by key."""

        def run(block: int) -> Entries:
            found = entries(block)
            return found[:, np.argsort(found[0])]

        self.make(name, len(self.blocks), run)

    def ranges(self, per_record: int = 1) -> list[tuple[int, int]]:
        """Divide the keys: return the lowest and the highest of each range."""
        count = max(-(-self.count * per_record // RANGE_ENTRIES), 1)
        edges = [(number << 64) // count for number in range(count + 1)]
        return [(low, high - 1) for low, high in pairwise(edges)]

    def between(self, name: str, low: int, high: int) -> Entries:
        """Return the entries of all runs whose keys are from `low` to `high`, sorted by key and then by record."""
        found = []
        for run in self.load_all(name):
            begin = np.searchsorted(run[0], np.uint64(low), "left")
            found.append(np.array(run[:, begin : np.searchsorted(run[0], np.uint64(high), "right")]))
        entries: Entries = np.concatenate(found, 1)
        return entries[:, np.lexsort((entries[-1], entries[0]))]

    def find_repeats(self, name: str, entries: Callable[[str], Entries]) -> None:
        """Store pairs (later record, first record) with equal entries, but for the record: runs by later record.
        `entries`: those of a shard.
        """
        self.make_runs(name, lambda block: np.concatenate([entries(shard) for shard in self.blocks[block]], 1))
        ranges = self.ranges()

        def repeats(number: int) -> Entries:
            found = self.between(name, *ranges[number])
            found = found[:, np.lexsort(found[::-1])]  # by all numbers, the record last
            new = np.r_[True, (found[:-1, 1:] != found[:-1, :-1]).any(0)][: found.shape[1]]
            first = found[-1, new][np.cumsum(new) - 1]
            pairs = np.stack([found[-1], first])[:, ~new]
            return pairs[:, np.argsort(pairs[0])]

        self.make(f"{name}_repeats", len(ranges), repeats)

    def rows(self, name: str, records: Entries) -> NDArray[Any]:
        """Return the rows of records in arrays with a row for each record of a block."""
        order = np.argsort(records)
        ends = np.searchsorted(records[order], self.starts[1:].astype(np.uint64))
        parts = [(number, part) for number, part in enumerate(np.split(order, ends)) if len(part)]
        found = [self.load(name, number)[records[part] - np.uint64(self.starts[number])] for number, part in parts]
        rows = np.empty((len(records), *found[0].shape[1:]), found[0].dtype)
        rows[order] = np.concatenate(found)
        return rows

    def make_texts(self, name: str, texts: Callable[[str], list[str]]) -> None:
        """Store a text of each record of the shards."""

        def encoded(block: int) -> list[bytes]:
            return [text.encode() for shard in self.blocks[block] for text in texts(shard)]

        self.make(name, len(self.blocks), lambda block: np.frombuffer(b"".join(encoded(block)), np.uint8))
        self.make(f"{name}_ends", len(self.blocks), lambda block: np.cumsum([0, *map(len, encoded(block))]))

    def texts(self, name: str, records: Sequence[int]) -> list[str]:
        """Return the texts of records."""
        opened: dict[int, Any] = {}
        found = []
        for record in records:
            block = int(np.searchsorted(self.starts, record, "right")) - 1
            if block not in opened:
                opened[block] = self.load(name, block), self.load(f"{name}_ends", block)
            content, ends = opened[block]
            begin, end = ends[record - self.starts[block] :][:2]
            found.append(content[begin:end].tobytes().decode())
        return found

    def remove(self) -> None:
        """Delete the arrays, once no process needs them any more."""
        with barrier(self.workers):
            if self.workers.rank == 0:
                remove_tree(self.folder)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:05d}.npy"
