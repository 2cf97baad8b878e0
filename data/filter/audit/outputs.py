"""What the filter leaves for people and programs: `scores.parquet` and `kept.jsonl`, whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import DataError
from data.filter.audit.page import write_audit
from data.filter.audit.statistics import OTHER, Audit, ScorerInfo
from data.filter.pipeline import THRESHOLDS, Filter
from data.filter.store import writing

SCORES, KEPT, AUDIT_JSON, AUDIT_PAGE = "scores.parquet", "kept.jsonl", "audit.json", "audit.html"


def write_audit_of(done: Filter, directory: Path, what: str, command: str = "") -> dict[str, Any]:
    """audit.json and audit.html; returns the figures. `what`: what was filtered, for people; `command`: how to do it
    again.
    """
    audit = audit_of(done, what)
    write_audit(audit, directory, command)
    return audit


def audit_of(done: Filter, what: str) -> dict[str, Any]:
    """The figures. Raises `DataError` where records in and records decided upon do not add up."""
    thresholds = done.decided.read_json(THRESHOLDS)
    scorer = done.job.scorer
    info = ScorerInfo(scorer.name, scorer.measures, scorer.direction, scorer.fingerprint)
    audit = Audit(done.rules, info, done.records.shards, thresholds, what, tokens=done.tokens)
    for shard, table in _tables(done):
        audit.add(shard, table.rename_columns({"length": "bytes"}))
    return audit.finish(done.text)


def _tables(done: Filter) -> Iterator[tuple[str, Any]]:
    """Shard by shard: id, source, domain, score, length (bytes of text), scored_bytes (of the answer, where there is
    one), tokens, kept, reason, detail, bucket, tie, why (there is no score), and the scores of an ensemble's members
    ("score:NAME").
    """
    import pyarrow

    for shard, rows in done.records.shards.items():
        records = done.records.read(shard, ["id", "source", "domain"])
        screened = done.screened.read(shard, ["tokens", "bytes", "scored_bytes", "tie"])
        decided = done.decided.read(shard, ["kept", "reason", "bucket"])
        columns = {name: records[name] for name in ("id", "source", "domain")}
        scored = done.scored.read(shard)
        columns |= {"score": scored["score"], "length": screened["bytes"]}
        columns |= {name: screened[name] for name in ("scored_bytes", "tokens", "tie")}
        columns |= {name: decided[name] for name in ("kept", "reason", "bucket")} | {"detail": scored["detail"]}
        columns |= {name: scored[name] for name in scored.column_names if name == "why" or name.startswith(OTHER)}
        if wrong := {name: len(column) for name, column in columns.items() if len(column) != rows}:
            raise DataError(
                f"{shard}: {rows:,} records were read, and there are {wrong}: filter anew, into another out="
            )
        yield shard, pyarrow.table(columns)


def write_scores(done: Filter, path: Path) -> None:
    """One parquet file of all records, a row group per shard."""
    import pyarrow.parquet

    with _whole(path) as temporary:
        writer = None
        for _, table in _tables(done):
            writer = writer or pyarrow.parquet.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()


def write_kept(done: Filter, path: Path) -> None:
    """The input's own records that stay, in the input's order, a line each."""
    with _whole(path) as temporary, open(temporary, "wb") as file:
        for shard in done.records.shards:
            kept = done.decided.read(shard, ["kept"])["kept"].to_pylist()
            table = done.records.read(shard, ["raw", "text"])
            for raw, text, stays in zip(table["raw"].to_pylist(), table["text"].to_pylist(), kept, strict=True):
                if stays:
                    line = json.dumps({"text": text}, ensure_ascii=False).encode() if raw is None else raw
                    file.write(line + b"\n")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A neighbour to write to, which takes the name of `path` at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
