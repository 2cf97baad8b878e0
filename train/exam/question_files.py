"""Read questions from jsonl files, and from data sets on the Hugging Face hub or in a folder.

Each reader checks every record: its shape, and that ids are unique. The first fault is a `ConfigError` in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError, UnreadableFileError
from core.files import locate, misfit, parse_json, read_text
from data.files import UnreadableFile, stream_tables

LONGEST_FILE, MOST_RECORDS = 64 * 2**20, 100_000
_ROWS = 256
"""Rows of a data set that are read at once."""

Located = tuple[str, dict[str, Any]]
"""The place of a record, for messages, and the record."""


def read_jsonl(path: str | Path, shape: Any, id_key: str = "id") -> list[Located]:
    """Return the records of a file with one on each line. A record without an id gets one: `line N`. Raises
    `ConfigError` (key `path`).
    """
    if not str(path):
        raise ConfigError("path", None, "name a jsonl file")
    try:
        text = read_text(path if isinstance(path, Path) else locate(path), LONGEST_FILE)
    except OSError as error:
        raise ConfigError("path", path, f"cannot be read: {error.strerror or error}") from None
    except UnreadableFileError as error:
        raise ConfigError("path", None, str(error)) from None
    records: dict[str, Located] = {}
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would split at other characters in a text
        if line.strip():
            try:
                record = parse_json(line)
                _take(records, f"{path}:{number}", record, shape, id_key, f"line {number}")
            except ValueError as error:
                raise ConfigError("path", None, f"{path}:{number}: {error}") from None
    if not records:
        raise ConfigError("path", path, "holds no question")
    return list(records.values())


def read_dataset(
    name: str, subset: str | None, split: str, columns: Mapping[str, Any], shape: Any, number: int | None
) -> list[Located]:
    """Return the first `number` rows of a data set as records. A row without an id gets one: `row N`.

    `columns` maps the keys of a record to columns with other names, as `_from_row` reads them. Raises `ConfigError`
    (keys `dataset`, `split` and `columns`).
    """
    known = [key.removesuffix("?") for key in shape]
    for key in columns:
        if key not in known:
            raise ConfigError(f"columns.{key}", None, "no such key of a question", known)
    records: dict[str, Located] = {}
    try:
        for table in stream_tables(name, subset, split, _ROWS):
            for row in table.to_pylist():
                where = f"row {len(records)}"
                record = {key: value for key in known if (value := _from_row(row, columns, key, shape)) is not None}
                if "id" in record:
                    record["id"] = str(record["id"])
                try:
                    _take(records, where, record, shape, "id", where)
                except ValueError as error:
                    raise ConfigError("dataset", name, f"{where}: {error}") from None
                if len(records) == number:
                    return list(records.values())
                if len(records) > MOST_RECORDS:
                    raise ConfigError("dataset", name, f"has more than {MOST_RECORDS:,} rows: set number")
    except UnreadableFile as error:
        raise ConfigError("dataset", name, f"cannot be read: {error}") from None
    if not records:
        raise ConfigError("dataset", name, "holds no question")
    return list(records.values())


def _from_row(row: Mapping[str, Any], columns: Mapping[str, Any], key: str, shape: Any) -> Any:
    """Return what a row has for a key of a record: a column ("answerKey"), a part of one ("choices.text"), or a list of
    several (["sol1", "sol2"]). An optional key without a column is None.
    """
    if key not in columns and (f"{key}?" in shape or key == "id"):
        return None
    wanted = columns.get(key, key)
    return [_column(row, key, one) for one in wanted] if isinstance(wanted, list) else _column(row, key, wanted)


def _column(row: Mapping[str, Any], key: str, name: Any) -> Any:
    value: Any = row
    for part in [name] if name in row else str(name).split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(f"columns.{key}", name, "the data set has no such column", _names(row))
        value = value[part]
    return value


def _names(row: Mapping[str, Any]) -> list[str]:
    """Return the columns of a row and their parts."""
    return [
        name
        for column, value in row.items()
        for name in ([f"{column}.{part}" for part in value] if isinstance(value, Mapping) else [column])
    ]


def _take(records: dict[str, Located], where: str, record: Any, shape: Any, id_key: str, default_id: str) -> None:
    """Append a record. Raises `ValueError` if it does not fit, or has the id of another one."""
    if problem := misfit(record, shape):
        raise ValueError(problem)
    name = record.setdefault(id_key, default_id)
    if name in records:
        raise ValueError(f"the {id_key} {name!r} is also that of {records[name][0]}")
    records[name] = where, record
