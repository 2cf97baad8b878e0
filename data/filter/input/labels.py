"""Labels of the records of an input: whether there are any, and the labels of copies of one text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from data.filter.input.readers import json_keys
from data.filter.input.records import Reason
from data.filter.screen.duplicates import Copy


def check_labelled(key: str | None, labels: Sequence[NDArray[np.float64]], raw: bytes | None) -> None:
    """Raise `ConfigError` if a column of labels is named, but no record has a label. `raw`: the first record."""
    if key is not None and not any(np.isfinite(one).any() for one in labels):
        keys = ", ".join(map(repr, json_keys(raw)))
        reason = f"no record has a number under it; the keys of the first record are {keys}"
        raise ConfigError("label_key", key, reason, ["null"])


def merged_labels(
    labels: Sequence[NDArray[np.float64]], copies: Sequence[Sequence[Copy | None]]
) -> tuple[dict[int, float], int]:
    """Return the mean label of each text that has labelled exact duplicates, by the index of its first record over all
    records, and the number of texts whose labels differ. One item per shard.
    """
    every = np.concatenate(labels)
    found: dict[int, list[float]] = {}
    for mine, others in zip(labels, copies, strict=True):
        for row in np.flatnonzero(np.isfinite(mine)).tolist():
            if (copy := others[row]) is not None and copy.reason is Reason.duplicate:
                own = every[[copy.of]]
                found.setdefault(copy.of, own[np.isfinite(own)].tolist()).append(float(mine[row]))
    means = {index: float(np.mean(values)) for index, values in found.items()}
    return means, sum(min(values) != max(values) for values in found.values())
