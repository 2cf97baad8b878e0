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
