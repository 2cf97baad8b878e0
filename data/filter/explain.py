"""One record's way through the filter: what each stage found, and why it stayed or went."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import ConfigError, DataError
from core.files import read_json
from data.filter.audit.outputs import AUDIT_JSON, SCORES
from data.filter.input.records import Reason


def explain(out: Path, name: str) -> str:
    """A few lines about the record called `name` in the filtering of `out`; `ConfigError` where there is none."""
    row = find(out, name)
    reason, score = Reason[row["reason"]].describe(row["detail"]), row["score"]
    lines = [
        f"{name} ({row['source']}, domain {row['domain']}): {'kept' if row['kept'] else 'left out'}, {reason}",
        f"length {_length(row)}, {row['tokens']:,} tokens",
    ]
    if score is not None and np.isfinite(score):
        lines.append(f"score {score:.4f}, {_place(out, row)}")
        lines += _threshold(out, row)
    elif row.get("why") is not None:
        lines.append(f"no score: {row['why']}; the same command asks again")
    return "\n".join(lines)


def _length(row: dict[str, Any]) -> str:
    whole, scored = row["length"], row["scored_bytes"]
    return f"{whole:,} bytes" if scored == whole else f"{whole:,} bytes, {scored:,} of them scored"


def _threshold(out: Path, row: dict[str, Any]) -> list[str]:
    """From which score on records of its domain and length were kept, as far as the selection says."""
    with _reading(out / AUDIT_JSON):
        domains = read_json(out / AUDIT_JSON)["thresholds"]["domains"]
        buckets = domains.get(row["domain"], {}).get("buckets", [])
    if not 0 <= row["bucket"] < len(buckets):
        return []
    bucket = buckets[row["bucket"]]
    among = f"of its domain, of {bucket['length']:,} scored bytes and more" if len(buckets) > 1 else "of its domain"
    return [
        f"threshold {bucket['score']:.4f} among records {among}" if bucket["score"] is not None else "none was kept"
    ]


def find(out: Path, name: str) -> dict[str, Any]:
    """The record's row of scores.parquet."""
    import pyarrow.compute
    import pyarrow.parquet

    path = out / SCORES
    if not path.exists():
        raise ConfigError("out", str(out), f"holds no filtering that has ended ({SCORES} is missing)")
    names: list[str] = []
    with _reading(path):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            here = batch.filter(pyarrow.compute.equal(batch["id"], name))
            if len(here):
                return here.to_pylist()[0]
            names += batch["id"].to_pylist()[: max(0, 10_000 - len(names))]
    raise ConfigError("explain", name, "no record has this name", difflib.get_close_matches(name, names) or names[:3])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises `DataError` where the file is damaged."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # pyarrow's are of these
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"{path} cannot be read ({reason}): filter again with the same out, which writes it anew"
        ) from None


def _place(out: Path, row: dict[str, Any]) -> str:
    """Where its score is among those it competed with."""
    import pyarrow.parquet

    with _reading(out / SCORES):
        table = pyarrow.parquet.read_table(out / SCORES, columns=["domain", "bucket", "score"])
    same = (table["domain"].to_numpy() == row["domain"]) & (table["bucket"].to_numpy() == row["bucket"])
    scores = table["score"].to_numpy()[same]
    scores = scores[np.isfinite(scores)]
    return f"higher than {(scores < row['score']).mean():.1%} of the {len(scores):,} records it competed with"
