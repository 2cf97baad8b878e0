"""Read records from files or data sets: plain text, prompts with responses, or chats.

An input is divided into parts: files, or one whole data set. A part is read from beginning to end by one process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, time
from decimal import Decimal
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from core.errors import ConfigError
from core.files import misfit, sha256_text
from data.files import (
    FileFormat,
    UnreadableFile,
    dataset_fingerprint,
    file_format,
    find_files,
    json_lines,
    read_rows,
    read_rows_from,
    row_group_sizes,
    stream_dataset,
)
from data.filter.config import RECORD_KEYS, InputConfig, under
from data.filter.input.records import Record

ASSISTANT = "assistant"
_SHOWN = 200
"""Maximum length in characters of the reason why a record is malformed, which may quote the record."""
_SHOWN_KEYS = 10

_RANGE_BYTES = 8 << 20
"""Bytes of a file that are hashed, and whose lines are counted, by one rank."""


@dataclass(frozen=True)
class MalformedRecord:
    """A row from which no record can be made. `raw`: the bytes that `on_error=keep` writes to `kept.jsonl`."""

    id: str
    source: str
    reason: str
    raw: bytes | None = None

    @property
    def error(self) -> ConfigError:
        """The error that `on_error=fail` raises."""
        advice = ["on_error=drop, which counts such records"]
        return ConfigError("input", self.source, f"cannot be read: {self.reason}", advice)


class InputPart(Protocol):
    """A part of the input. `fingerprint` (of the content) or `keys` changes whenever its records could change."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def keys(self) -> dict[str, str | None]:
        """Settings that decide what a record is, by name, so that a message can name the one that changed."""
        ...

    def records(self) -> Iterator[Record | MalformedRecord]: ...


def input_parts(config: InputConfig) -> list[RecordPart]:
    """List the parts of an input in a fixed order. Raises `ConfigError` if there is nothing to read."""
    if config.dataset is not None:
        return [RecordPart(config.dataset, config)]
    with under("input"):
        return [RecordPart(name, config, path) for name, path in find_files(str(config.input))]


def clean_records(path: str, config: InputConfig) -> list[Record]:
    """Read reference text: files with the columns of `config`, or plain text. Raises `ConfigError` for other files."""
    config = replace(config, input=path, dataset=None, id_key=None, domain_key=None, label_key=None)
    found: list[Record] = []
    try:
        for part in input_parts(config):
            if part.path and file_format(part.path) is FileFormat.text:
                part = replace(part, config=InputConfig(input=path))
            for record in part.records():
                if isinstance(record, MalformedRecord):
                    raise ConfigError("input", record.source, f"cannot be read: {record.reason}")
                found.append(record)
        if not found:
            raise ConfigError("input", path, "holds no record")
    except ConfigError as error:
        raise ConfigError("select.clean", error.value, error.reason, error.legal) from None
    return found


def read_record(config: InputConfig, row: Any, place: str) -> Record | MalformedRecord:
    """Make a record from a row: a line of JSON as bytes, or a dictionary. `place`: file and line, the default id."""
    try:
        line = row.decode() if isinstance(row, bytes) else None
        return _record(config, row if line is None else json.loads(line), place, line)
    except (ValueError, RecursionError) as error:
        raw = row if isinstance(row, bytes) else _line(row, place).encode()
        return MalformedRecord(place, place, str(error)[:_SHOWN], raw)


def _record(config: InputConfig, row: Any, place: str, line: str | None) -> Record:
    """Make the record. Raises `ValueError` with the reason if the row is malformed."""
    if not isinstance(row, dict):
        raise ValueError("not an object with keys and values")
    text, answer_start = _text(config, row)
    name = place if config.id_key is None else str(_get(row, config.id_key, str, int))
    domain = "all" if config.domain_key is None else str(_get(row, config.domain_key, str, int))
    try:
        "".join((name, domain, text)).encode()
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair, which UTF-8 cannot encode
        raise ValueError("holds half of a surrogate pair, which is not text") from None
    raw = _line(row, place) if line is None else line
    label, bad_label = (None, None) if config.label_key is None else _label(row.get(config.label_key))
    return Record(name, domain, place, text, answer_start, raw, label=label, bad_label=bad_label)


def _label(value: Any) -> tuple[float | None, str | None]:
    """Return the value as a number. NaN is no label, since pandas writes it where a column has gaps. Return any other
    value that is not a finite number as it would be written in Python, shortened.
    """
    if value is None:
        return None, None
    number = math.inf
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if math.isinf(number):
        return None, reprlib.repr(value)
    return None if math.isnan(number) else number, None


def _text(config: InputConfig, row: dict[str, Any]) -> tuple[str, int | None]:
    """Return the text of a row, and the index at which its response begins (None for a plain document)."""
    if config.messages_key is not None:
        return _chat(_get(row, config.messages_key, list))
    if config.prompt_key is None or config.response_key is None:
        return _get(row, config.text_key, str), None
    prompt, response = (_get(row, key, str) for key in (config.prompt_key, config.response_key))
    if not prompt.strip():  # without a prompt, words of the template must not pass for one
        return response, 0
    before, _, after = config.template.partition("{response}")
    before = before.replace("{prompt}", prompt)
    return before + response + after, len(before)


def _line(row: dict[str, Any], place: str) -> str:
    """Write a row of columns as a line of JSON. Raises `ConfigError` that names a column which JSON cannot hold."""
    found = {}
    for column, value in row.items():
        try:
            found[column] = _for_json(value)
        except TypeError as error:
            reason = f"the column {column!r} holds {error}, which JSON cannot hold: drop that column"
            raise ConfigError("input", place, reason) from None
    line = json.dumps(found, ensure_ascii=False)
    return json.dumps(found) if misfit(line, str) else line  # half of a surrogate pair must stay escaped


def _for_json(value: Any) -> Any:
    """Convert for JSON: bytes to {"base64": text}, NaN and infinity to null. Raises `TypeError` for unknown types."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case None | str() | int():
            return value
        case bytes():
            return {"base64": base64.b64encode(value).decode()}
        case date() | time():
            return value.isoformat()
        case Decimal() | UUID():
            return str(value)
        case dict():
            return {str(key): _for_json(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_for_json(inner) for inner in value]
    raise TypeError(f"a {type(value).__name__}")


def _chat(messages: list[Any]) -> tuple[str, int]:
    """Join the messages, each after a line with its role, up to the last message of the assistant: the response. Return
    the text and the index of the response. If all earlier messages are empty, the text is only the response.
    """
    text, answer_start, end, said, has_prompt = "", None, 0, False, False
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("a message is not an object with role and content")
        role, content = (_get(message, key, str) for key in ("role", "content"))
        text += f"{role}:\n"
        if role == ASSISTANT:
            answer_start, end, has_prompt = len(text), len(text) + len(content), said
        text += f"{content}\n\n"
        said = said or bool(content.strip())
    if answer_start is None:
        raise ValueError("no message of the assistant")
    return (text[:end], answer_start) if has_prompt else (text[answer_start:end], 0)


def json_keys(raw: bytes | None) -> list[str]:
    """Return the first keys of a line of JSON; an empty list if the line is not an object."""
    try:
        row = json.loads(raw or b"")
    except (ValueError, RecursionError):
        return []
    return list(row)[:_SHOWN_KEYS] if isinstance(row, dict) else []


def _get(row: dict[str, Any], key: str, *kinds: type) -> Any:
    if key not in row:
        raise ValueError(f"no {key!r}; it has {', '.join(map(repr, row))}")
    value = row[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"{key!r} is {kind}, not {' or '.join(kind.__name__ for kind in kinds)}")
    return value


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read on its own: the lines that begin in a range of bytes, or a group of rows."""

    start: int
    """Offset in bytes, or number of the group."""
    number: int
    """Number of the first line or row, in the file."""
    records: int


@dataclass(frozen=True)
class RecordPart:
    """The records of a file (`path`), or of a data set of the `datasets` library."""

    name: str
    config: InputConfig
    path: Path | None = None

    @property
    def byte_ranges(self) -> list[tuple[int, int]]:
        """The ranges of bytes in which the file is hashed; a data set has none."""
        size = 0 if self.path is None else max(self.path.stat().st_size, 1)
        return [(start, min(start + _RANGE_BYTES, size)) for start in range(0, size, _RANGE_BYTES)]

    def scan(self, start: int, stop: int) -> tuple[str, int, int]:
        """Return the digest of a range of bytes, its number of line ends, and the number of records that begin in it: 0
        unless the file is plain JSON lines, and -1 if it cannot be read.
        """
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        records = 0
        if self.path.suffix == ".jsonl":
            try:
                records = sum(1 for _ in json_lines(self.path, start, stop))
            except UnreadableFile:  # reading from the beginning will tell the line
                records = -1
        return hashlib.sha256(content).hexdigest(), content.count(b"\n"), records

    def pieces(self, scanned: Sequence[tuple[str, int, int]]) -> list[Piece]:
        """Return the pieces of the file, given the results of `scan` for each of its ranges. None: it is read whole."""
        if self.path is None or len(scanned) == 1:
            return []
        if self.path.suffix == ".jsonl" and all(records >= 0 for *_, records in scanned):
            numbers = accumulate((ends for _, ends, _ in scanned), initial=1)
            parts = zip(self.byte_ranges, numbers, scanned, strict=False)
            return [Piece(start, number, records) for (start, _), number, (*_, records) in parts]
        try:
            sizes = row_group_sizes(self.path) if self.path.suffix == ".parquet" else []
        except UnreadableFile:  # reading will tell
            return []
        return [Piece(place, sum(sizes[:place]), rows) for place, rows in enumerate(sizes)]

    @property
    def fingerprint(self) -> str:
        if self.path is None:
            return dataset_fingerprint(self.name, self.config.subset, self.config.split)
        return self.fingerprint_of([self.scan(*one) for one in self.byte_ranges])

    def fingerprint_of(self, scanned: Sequence[tuple[str, int, int]]) -> str:
        return sha256_text(self.name, *(digest for digest, *_ in scanned))

    @property
    def keys(self) -> dict[str, str | None]:
        keys = {key: getattr(self.config, key) for key in RECORD_KEYS}
        return {key: value for key, value in keys.items() if key != "label_key" or value is not None}

    def records(self, piece: Piece | None = None, skip: int = 0) -> Iterator[Record | MalformedRecord]:
        """Read the records from a piece on, without the first `skip`; from the beginning by default."""
        rows: Iterator[tuple[int, Any]]
        if self.path is None:
            rows = enumerate(stream_dataset(self.name, self.config.subset, self.config.split))
        elif piece is None:
            rows = read_rows(self.path, errors="replace")
        else:
            rows = read_rows_from(self.path, piece.start, piece.number)
        try:
            for number, row in islice(rows, skip, None):
                yield read_record(self.config, row, f"{self.name}:{number}")
        except UnreadableFile as error:
            key, value = ("dataset", self.name) if self.path is None else ("input", str(self.path))
            raise ConfigError(key, value, f"cannot be read: {error}") from None
