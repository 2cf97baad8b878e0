"""What the filter leaves for people and programs: `scores.parquet` and `kept.jsonl`, whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import DataError
from core.files import read_json
from data.filter.audit import Audit, ScorerInfo
from data.filter.page import write_audit
from data.filter.pipeline import THRESHOLDS, Filter

SCORES, KEPT, AUDIT_JSON, AUDIT_PAGE = "scores.parquet", "kept.jsonl", "audit.json", "audit.html"


def scores_tables(done: Filter) -> Iterator[Any]:
    """Shard by shard: id, source, domain, score, length (bytes of text), tokens, kept, reason, bucket, tie."""
    for _, table in _tables(done):
        yield table


def write_audit_of(done: Filter, directory: Path, what: str, command: str = "") -> None:
    """audit.json and audit.html. `what`: what was filtered, for people; `command`: how to do it again."""
    thresholds = read_json(done.decided.directory / THRESHOLDS)
    scorer = done.job.scorer
    info = ScorerInfo(scorer.name, scorer.measures, scorer.direction, scorer.fingerprint)
    audit = Audit(done.rules, info, done.records.shards, thresholds, what, tokens=done.tokens)
    for shard, table in _tables(done):
        audit.add(shard, table.rename_columns({"length": "bytes"}))
    write_audit(audit.finish(done.text), directory, command)


def _tables(done: Filter) -> Iterator[tuple[str, Any]]:
    import pyarrow

    for shard in done.records.shards:
        records = done.records.read(shard, ["id", "source", "domain"])
        screened = done.screened.read(shard, ["tokens", "bytes", "tie"])
        decided = done.decided.read(shard, ["kept", "reason", "bucket"])
        columns = {name: records[name] for name in ("id", "source", "domain")}
        columns |= {"score": done.scored.read(shard, ["score"])["score"], "length": screened["bytes"]}
        columns |= {name: screened[name] for name in ("tokens", "tie")}
        columns |= {name: decided[name] for name in ("kept", "reason", "bucket")}
        yield shard, pyarrow.table(columns)


def write_scores(done: Filter, path: Path) -> None:
    """One parquet file of all records, a row group per shard."""
    import pyarrow.parquet

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer = None
        for table in scores_tables(done):
            writer = writer or pyarrow.parquet.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}): free some space and run again") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_kept(done: Filter, path: Path) -> None:
    """The input's own records that stay, in the input's order, a line each."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for shard in done.records.shards:
                kept = done.decided.read(shard, ["kept"])["kept"].to_pylist()
                for record, stays in zip(done.rows(shard), kept, strict=True):
                    if stays:
                        text = json.dumps({"text": record.text}, ensure_ascii=False)
                        file.write(f"{record.raw if record.raw is not None else text}\n")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}): free some space and run again") from None
    finally:
        temporary.unlink(missing_ok=True)
