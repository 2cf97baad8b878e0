"""Explain one record: what each stage of the filter found, and why it was kept or dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from core.errors import ConfigError, counted, printable
from core.files import read_json
from data.filter.audit.findings import named, reason_label
from data.filter.audit.outputs import AUDIT_JSON, SCORES
from data.filter.input.records import Reason
from data.filter.store import reading

_ADVICE = "filter again with the same out to rewrite it"


def explain(out: Path, name: str, with_pictures: bool = True) -> str:
    """Describe the record `name` of the filter run in `out`. Raises `ConfigError` if the run or record is missing."""
    row = find(out, name)
    with reading(out / AUDIT_JSON, _ADVICE):
        audit = read_json(out / AUDIT_JSON)
        buckets = audit["thresholds"]["domains"].get(row["domain"], {}).get("buckets", [])
        label = reason_label(audit, Reason[row["reason"]])
    reason = label if row["detail"] is None else Reason[row["reason"]].describe(row["detail"])
    scored = "" if row["scored_bytes"] == row["length"] else f", {row['scored_bytes']:,} of them scored"
    lines = [
        f"{name} ({row['source']}, domain {named(row['domain'])}): {'kept' if row['kept'] else 'dropped'}, {reason}",
        f"length {counted(row['length'], 'byte')}{scored}, {counted(row['tokens'], 'token')}",
    ]
    if (score := row["score"]) is not None and np.isfinite(score):
        lines.append(f"score {score:.4f}, {_rank(out, row)}")
        if 0 <= row["bucket"] < len(buckets):
            lines.append(_threshold(buckets[row["bucket"]], len(buckets)))
    elif row.get("why") is not None:
        lines.append(f"no score: {row['why']}; rerun the filter to request it again")
    for number, picture in enumerate(row.get("pictures", []) if with_pictures else []):
        shape = f"{picture['width']} x {picture['height']} pixels, {picture['size']:,} bytes"
        tiles = f"{counted(picture['tiles'], 'tile')} ({counted(picture['tokens'], 'token')})"
        name = printable(picture["name"])
        lines.append(f"picture {number}: {name}, {shape}, {tiles}, SHA-256 {picture['sha256']}")
    return "\n".join(lines)


def find(out: Path, name: str) -> dict[str, Any]:
    """Return the record's row of scores.parquet."""
    import pyarrow.parquet

    path = out / SCORES
    if not path.exists():
        raise ConfigError("out", str(out), f"holds no finished filter run ({SCORES} is missing)")
    with reading(path, _ADVICE):
        found = pyarrow.parquet.read_table(path, filters=[("id", "=", name)]).to_pylist()
        if found:
            return found[0]
        names = pyarrow.parquet.read_table(path, columns=["id"])["id"]
    have = f"{counted(len(names), 'record')}, {names[0]} to {names[-1]}" if len(names) else "no records"
    raise ConfigError("explain", name, f"no record has this name; there are {have}")


def _rank(out: Path, row: dict[str, Any]) -> str:
    """Describe the rank of the record's score among the records with which it competed."""
    import pyarrow.parquet

    competed = [(key, "=", row[key]) for key in ("domain", "bucket")]
    with reading(out / SCORES, _ADVICE):
        scores = pyarrow.parquet.read_table(out / SCORES, columns=["score"], filters=competed)["score"].to_numpy()
    scores = scores[np.isfinite(scores)]
    return f"higher than {(scores < row['score']).mean():.1%} of the {len(scores):,} records it competed with"


def _threshold(bucket: dict[str, Any], buckets: int) -> str:
    """Describe the threshold of a length bucket of a domain that has `buckets`."""
    if bucket["score"] is None:
        return "none of these records was kept"
    among = f" with {bucket['length']:,} scored bytes or more" if buckets > 1 else ""
    return f"threshold {bucket['score']:.4f} for records of its domain{among}"
