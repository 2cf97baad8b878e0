"""Arrays on disk give back what was stored, sorted and by record, at the borders of blocks and ranges too."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.filter import runs
from data.filter.runs import DiskArrays
from data.filter.store import OneWorker

ROWS = {"a": 20, "b": 0, "c": 20, "d": 25, "e": 1}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskArrays:
    monkeypatch.setattr(runs, "BLOCK_RECORDS", 30)
    monkeypatch.setattr(runs, "RANGE_ENTRIES", 10)
    return DiskArrays(tmp_path, ROWS, OneWorker())


def test_shards_form_blocks_and_ranges_divide_all_keys(disk):
    assert disk.blocks == [["a", "b"], ["c"], ["d", "e"]] and disk.starts.tolist() == [0, 20, 40]
    ranges = disk.ranges(3)
    assert len(ranges) == 20 and ranges[0][0] == 0 and ranges[-1][1] == 2**64 - 1
    assert all(low == high + 1 for (_, high), (low, _) in pairwise(ranges))


def test_entries_come_by_key_and_then_by_record(disk):
    """Many keys are equal, so that a sort which is not stable shows."""
    keys = np.random.default_rng(0).integers(0, 3, disk.count).astype(np.uint64)

    def entries(block: int) -> np.ndarray:
        records = np.arange(disk.starts[block], [*disk.starts, disk.count][block + 1]).astype(np.uint64)[::-1]
        return np.stack([keys[records.astype(np.int64)], records])

    disk.make_runs("keys", entries)
    whole = disk.between("keys", 0, 2**64 - 1)
    assert whole.T.tolist() == sorted([int(key), record] for record, key in enumerate(keys))
    assert disk.between("keys", 1, 1).tolist() == whole[:, whole[0] == 1].tolist()


def test_texts_and_rows_of_any_records(disk):
    first = disk.first
    disk.make_texts("names", lambda shard: [f"é{first[shard] + row}" for row in range(ROWS[shard])])
    every = list(range(disk.count))
    assert disk.texts("names", every) == [f"é{record}" for record in every]
    disk.make("rows", len(disk.blocks), lambda block: np.arange(disk.starts[block], [*disk.starts, 66][block + 1]))
    some = np.array([65, 0, 20, 19, 40, 39, 20], np.uint64)
    assert disk.rows("rows", some).tolist() == some.tolist()
