"""Write the files of a filter run: `scores.parquet`, `kept.jsonl` and the audit. Each is complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from core.errors import DataError
from core.files import write_bytes, write_json, write_text
from data.filter.audit.page import audit_page
from data.filter.audit.plots import draw
from data.filter.audit.statistics import OTHER, Audit
from data.filter.input.documents import DocumentsPart
from data.filter.input.records import LABEL, Record, RecordPicture
from data.filter.pipeline import THRESHOLDS, Filter
from data.filter.store import writing
from data.filter.tables import PICTURES, picture_type
from data.images.parts import ImagePart, Part, PartsDocument, VideoPart

SCORES, KEPT, AUDIT_JSON, AUDIT_PAGE = "scores.parquet", "kept.jsonl", "audit.json", "audit.html"
KEPT_DOCUMENTS = "kept.parquet"
"""Instead of `KEPT` for documents with pictures."""
_SHOWN_OF_PICTURES = tuple(one.name for one in fields(RecordPicture) if one.name not in ("colours", "thumbnail"))
_FLUSHED_BYTES = 1 << 26
"""Bytes of pictures and videos in a row group of `KEPT_DOCUMENTS`."""


def write_audit_of(done: Filter, directory: Path, what: str, command: str = "") -> dict[str, Any]:
    """Write audit.json and audit.html, and return the statistics. `what` names the input and `command` repeats it."""
    audit = audit_of(done, what)
    write_audit(audit, directory, command)
    return audit


def write_audit(audit: dict[str, Any], directory: Path, command: str) -> None:
    """Write audit.json and audit.html. Raises `DataError` if they cannot be written, as on a full disk."""
    with writing(directory / AUDIT_JSON):
        write_json(directory / AUDIT_JSON, audit)
    page = audit_page(audit, draw(audit), draw(audit, dark=True), str(directory), command)
    with writing(directory / AUDIT_PAGE):
        write_text(directory / AUDIT_PAGE, page)


def keep_audit(source: Path, directory: Path, *others: str) -> None:
    """Copy the files of the audit and the files `others` from `source` to `directory`, if they exist."""
    for name in (AUDIT_JSON, AUDIT_PAGE, *others):
        if (source / name).exists():
            write_bytes(directory / name, (source / name).read_bytes())


def audit_of(done: Filter, what: str) -> dict[str, Any]:
    """Compute the statistics. Raises `DataError` if the numbers of records read and of records decided differ."""
    thresholds, documents = done.decided.read_json(THRESHOLDS), sum(done.records.shards.values())
    audit = Audit(done.rules, done.job.scorer, thresholds, what, documents, done.tokens, done.proof)
    for shard, table in _tables(done):
        audit.add(shard, table.rename_columns({"length": "bytes"}))
    return audit.finish(done.text, done.thumbnails if done.has_pictures else None)


def _tables(done: Filter) -> Iterator[tuple[str, Any]]:
    """Yield the name of each shard and its table: id, source, domain, score, length (bytes of text), scored_bytes (of
    the answer, or of a plain document), tokens, tie, kept, reason, bucket, detail, why (the reason for a missing
    score), "score:NAME" of every other scorer, and, if records have them, `LABEL` and `PICTURES`.
    """
    import pyarrow

    for shard, rows in done.records.shards.items():
        scored = done.scored.read(shard)
        extra = [name for name in scored.column_names if name == "why" or name.startswith(OTHER)]
        parts = (
            done.records.read(shard, ["id", "source", "domain"]),
            scored.select(["score"]),
            done.screened.read(shard, ["bytes", "scored_bytes", "tokens", "tie"]).rename_columns({"bytes": "length"}),
            done.decided.read(shard, ["kept", "reason", "bucket"]),
            scored.select(["detail", *extra]),
        )
        columns = {name: table[name] for table in parts for name in table.column_names}
        if done.label_source:
            columns[LABEL] = done.labels(shard) if done.label_source == "input" else scored[OTHER + LABEL]
        if done.has_pictures:
            columns[PICTURES] = _shown_pictures(done, shard)
        if wrong := {name: len(column) for name, column in columns.items() if len(column) != rows}:
            raise DataError(f"{shard}: {rows:,} records were read, but {wrong} were decided: choose another out=")
        yield shard, pyarrow.table(columns)


def _shown_pictures(done: Filter, shard: str) -> Any:
    import pyarrow

    rows = [[{n: getattr(picture, n) for n in _SHOWN_OF_PICTURES} for picture in row] for row in done.pictures(shard)]
    struct = picture_type().value_type
    return pyarrow.array(rows, pyarrow.list_(pyarrow.struct([struct.field(name) for name in _SHOWN_OF_PICTURES])))


def write_scores(done: Filter, path: Path) -> None:
    """Write one parquet file of all records, with a row group per shard."""
    import pyarrow.parquet

    with _whole(path) as temporary:
        writer = None
        for _, table in _tables(done):
            writer = writer or pyarrow.parquet.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()


def write_kept(done: Filter, path: Path) -> None:
    """Write the kept records, unchanged and in the order of the input, one per line."""
    with _whole(path) as temporary, open(temporary, "wb") as file:
        for shard in done.records.shards:
            kept = done.decided.read(shard, ["kept"])["kept"].to_pylist()
            table = done.records.read(shard, ["raw", "text"])
            for raw, text, stays in zip(table["raw"].to_pylist(), table["text"].to_pylist(), kept, strict=True):
                if stays:
                    line = json.dumps({"text": text}, ensure_ascii=False).encode() if raw is None else raw
                    file.write(line + b"\n")


def write_kept_documents(done: Filter, path: Path) -> None:
    """Write the kept documents in the order of the input. The files of the input are read again. Raises `DataError` if
    their documents have changed.
    """
    write_documents(path, _kept_documents(done))


def write_documents(path: Path, documents: Iterable[PartsDocument]) -> None:
    """Write documents with the bytes of their pictures and videos: a file that a source of kind `documents` reads."""
    import pyarrow.parquet

    media = pyarrow.struct([("bytes", pyarrow.large_binary()), ("path", pyarrow.string())])
    part = pyarrow.struct([("text", pyarrow.string()), ("image", media), ("video", media)])
    schema = pyarrow.schema([("id", pyarrow.string()), ("parts", pyarrow.list_(part))])
    with _whole(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        size = 0
        for document in documents:
            rows.append({"id": document.id, "parts": [_part_of_kept(one) for one in document.parts]})
            size += sum(len(one) if isinstance(one, str) else len(one.data) for one in document.parts)
            if size >= _FLUSHED_BYTES:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows, size = [], 0
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _kept_documents(done: Filter) -> Iterator[PartsDocument]:
    for number, part in enumerate(done.job.parts):
        assert isinstance(part, DocumentsPart)
        documents = part.documents()
        for shard in done.shards_of(number):
            kept = done.decided.read(shard, ["kept"])["kept"].to_pylist()
            for record, stays in zip(done.rows(shard), kept, strict=True):
                document = next(documents, None)
                if not stays:
                    continue
                if not isinstance(document, PartsDocument) or not _is_same(document, record):
                    raise DataError(
                        f"the documents of {part.name} changed while they were filtered: choose another out="
                    )
                yield document


def _is_same(document: PartsDocument, record: Record) -> bool:
    """Return whether a document is the one that was filtered. Frames of videos are not decoded again."""
    has_video = any(isinstance(part, VideoPart) for part in document.parts)
    digests = tuple(picture.sha256 for picture in record.pictures)
    return (document.id, document.text) == (record.id, record.text) and (has_video or document.image_digests == digests)


def _part_of_kept(part: Part) -> dict[str, Any]:
    match part:
        case str():
            return {"text": part}
        case ImagePart():
            return {"image": {"bytes": part.data, "path": part.name}}
        case VideoPart():
            return {"video": {"bytes": part.data, "path": part.name}}


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file that replaces `path` at the end of the block."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
