"""Compute sums and samples of more records than fit in memory, shard by shard.

Results do not depend on the order of the shards: integers are summed, and a sample is the first records of a total
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

OTHER, LABEL = "score:", "label"
"""Prefix of the columns with the scores of an ensemble's members and controls; column of labels."""


class Tally:
    """Accumulate sums, minima and maxima by key. Memory grows with the number of distinct keys only."""

    def __init__(self, keys: Sequence[str], values: dict[str, str]) -> None:
        """`values`: column -> "sum", "min" or "max"."""
        self._keys, self._values = list(keys), values
        self._table: Any = None

    def add(self, table: Any) -> None:
        """Add a `pyarrow.Table` that has the columns of all keys and values."""
        import pyarrow

        table = table.select([*self._keys, *self._values])
        parts = [table] if self._table is None else [self._table, table]
        grouped = pyarrow.concat_tables(parts).group_by(self._keys).aggregate(list(self._values.items()))
        renamed = grouped.rename_columns({f"{name}_{how}": name for name, how in self._values.items()})
        self._table = renamed.select([*self._keys, *self._values])

    def table(self) -> Any:
        """Return the accumulated values, sorted by key."""
        return self._table.sort_by([(name, "ascending") for name in self._keys])


def first_of_each(table: Any, groups: Sequence[str], order: Sequence[tuple[str, str]], count: int) -> Any:
    """Return the first `count` rows of every group. `order`: columns to sort by, each with "ascending" or "descending".
    The result is sorted by group; without `groups` all rows are one group.
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


def rounded(value: float | None) -> float | None:
    """Round to six significant digits, which do not depend on the order of summation. None for NaN and infinity."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")
