"""Figures over more records than fit in memory: sums and first few, gathered shard by shard in any order.

Everything here is the same whatever the order of the shards: whole numbers are added, and of records that are looked
at closely the first by a total order are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Order = Sequence[tuple[str, str]]
"""Columns with "ascending" or "descending"."""

_FRACTION_BITS = 15
"""Of a number's binary fraction that are kept: steps of 3e-5 of its size, and whole numbers up to 65,536 exact."""
_SHIFT = 23 - _FRACTION_BITS


class Tally:
    """Sums, least and greatest values by key; memory grows with the number of different keys alone."""

    def __init__(self, keys: Sequence[str], values: dict[str, str]) -> None:
        """`values`: column -> "sum", "min" or "max"."""
        self._keys, self._values = list(keys), values
        self.table: Any = None

    def add(self, table: Any) -> None:
        """A `pyarrow.Table` with the columns of all keys and values."""
        import pyarrow

        table = table.select([*self._keys, *self._values])
        parts = [table] if self.table is None else [self.table, table]
        grouped = pyarrow.concat_tables(parts).group_by(self._keys).aggregate(list(self._values.items()))
        names = {f"{name}_{how}": name for name, how in self._values.items()}
        columns = {name: grouped[name] for name in self._keys} | {names[n]: grouped[n] for n in names}
        self.table = pyarrow.table(columns)

    def rows(self) -> list[dict[str, Any]]:
        """In the order of the keys."""
        if self.table is None:
            return []
        found: list[dict[str, Any]] = self.sorted().to_pylist()
        return found

    def sorted(self) -> Any:
        return self.table.sort_by([(name, "ascending") for name in self._keys])


def first_of_each(table: Any, groups: Sequence[str], order: Order, count: int) -> Any:
    """The first `count` rows by `order` of every group, groups in order; all rows are one group where `groups` is
    empty.
    """
    import pyarrow
    from pyarrow import compute

    rows = table.num_rows
    table = table.sort_by([*((name, "ascending") for name in groups), *order])
    if not groups or not rows:
        return table.slice(0, count)
    begins = np.zeros(rows, bool)
    begins[0] = True
    for name in groups:
        column = table[name]
        begins[1:] |= np.asarray(compute.not_equal(column.slice(1), column.slice(0, rows - 1)))
    place = np.arange(rows)
    return table.filter(pyarrow.array(place - np.maximum.accumulate(np.where(begins, place, 0)) < count))


def key_of(values: Floats) -> Integers:
    """Numbers in steps fine enough for a picture, as keys that sort like them. No number must be NaN."""
    largest = np.finfo(np.float32).max
    bits = np.clip(values + 0.0, -largest, largest).astype(np.float32).view(np.int32).astype(np.int64)
    size = (bits & 0x7FFFFFFF) >> _SHIFT
    return np.where(bits < 0, -size, size)


def value_of(keys: Integers) -> Floats:
    """The number of the smallest size that has this key."""
    size = (np.abs(keys) << _SHIFT).astype(np.int32).view(np.float32).astype(np.float64)
    return np.where(keys < 0, -size, size)


def quantile(values: Floats, weights: Integers, share: float) -> float:
    """The smallest of the sorted `values` at which their weights reach `share` of all."""
    reached = np.searchsorted(np.cumsum(weights), share * weights.sum(), "left")
    return float(values[min(int(reached), len(values) - 1)])


def counts(values: Floats, weights: Integers, edges: Floats) -> Integers:
    """A histogram in whole numbers; what lies beyond the edges goes into the outermost bins."""
    found = np.zeros(len(edges) - 1, np.int64)
    np.add.at(found, np.clip(np.searchsorted(edges, values, "right") - 1, 0, len(found) - 1), weights)
    return found


def spearman(first: Floats, second: Floats) -> float | None:
    """Correlation of ranks, ties at their mean rank (Spearman 1904); None where either does not vary."""
    if len(first) < 2:
        return None
    a, b = (_centred_ranks(values) for values in (first, second))
    scale = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / scale if scale else None


def _centred_ranks(values: Floats) -> Floats:
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(times) - (times - 1) / 2
    return mean_rank[place] - (len(values) + 1) / 2


def rounded(value: float | None) -> float | None:
    """Six digits: what is left does not depend on how a machine adds up."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")
