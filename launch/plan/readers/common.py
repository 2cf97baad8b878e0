"""What the readers of published tables share: rows, cells, and what a row measured."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from core.errors import ConfigError, DataError, UnreadableFileError
from core.files import TEXT_LIMIT
from launch.plan.workload import Job

Row = Mapping[str, str]


class MemoryKind(Enum):
    """Which memory a source measured."""

    last_rank_peak = "last_rank_peak"
    """Peak of allocated memory on the last rank, where Megatron writes its logs."""
    first_rank_peak = "first_rank_peak"
    fullest_rank_peak = "fullest_rank_peak"
    static = "static"
    """Allocated memory between steps on the first rank."""


@dataclass(frozen=True)
class Measured:
    """A job and what its source measured. None: not measured. `number`: the row's line in the file, header 1."""

    number: int
    job: Job
    step_s: float | None = None
    memory_bytes: float | None = None
    memory_kind: MemoryKind = MemoryKind.fullest_rank_peak
    reserved_bytes: float | None = None
    """Peak of the allocator's reservation on the first rank."""
    fits: bool | None = None
    group: str | None = None
    """Name of the group of rows with one model on one number of GPUs, between which layout regret is measured."""
    source: str = ""
    rival_step_s: float | None = None
    rival_memory_bytes: float | None = None


@dataclass(frozen=True)
class Skipped:
    """A row for which nothing can be predicted."""

    number: int
    reason: str


@dataclass(frozen=True)
class Table:
    """The content of a file."""

    kind: str
    rows: list[Measured] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


class UnusableRow(Exception):
    """A row does not say enough for a prediction."""


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, Row]]]:
    """Return the header and the rows of a CSV file, each with its line. Raises `DataError` if it cannot be read."""
    try:
        if path.stat().st_size > TEXT_LIMIT:
            raise UnreadableFileError(f"{path} is larger than {TEXT_LIMIT // 2**20} MiB")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows: list[tuple[int, Row]] = []
            for row in reader:
                rows.append((reader.line_num, {name: row.get(name) or "" for name in header}))
    except OSError as error:
        raise ConfigError("validate", str(path), error.strerror or "cannot be read") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file: {error}") from error
    return header, rows


def number(row: Row, *names: str) -> float | None:
    """Return the first of these cells that holds a finite number, or None."""
    for name in names:
        try:
            value = float(row.get(name, "").strip().replace(",", ""))
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return None


def count(row: Row, name: str, default: int | None = None, least: int = 0) -> int:
    """Return a cell as an integer. Raises `UnusableRow` for another value, without a default, or below `least`."""
    value = number(row, name)
    if value is None:
        if default is None:
            raise UnusableRow(f"{name} is missing")
        value = default
    if value < least or value != int(value) or value > 1e12:
        raise UnusableRow(f"{name}={value:g} is not a count")
    return int(value)


def flag(row: Row, name: str) -> bool:
    return row.get(name, "").strip().lower() in ("true", "1", "yes", "1.0")


def padded(vocab: int, tp: int, multiple: int = 128) -> int:
    """Return the vocabulary padded to what tensor parallelism divides, as Megatron pads it."""
    unit = multiple * tp
    return -(-vocab // unit) * unit


def convert(rows: list[tuple[int, Row]], read: object, kind: str) -> Table:
    """Return the table of all rows, with those skipped that `read` cannot use."""
    table = Table(kind)
    for line, row in rows:
        try:
            table.rows.append(read(line, row))  # type: ignore[operator]
        except UnusableRow as error:
            table.skipped.append(Skipped(line, str(error)))
        except ConfigError as error:
            table.skipped.append(Skipped(line, f"{error.key}={error.value}: {error.reason}"))
    return table


def words(text: str) -> Iterator[str]:
    """Yield the parts of a list that a cell holds, separated by commas, plus signs or spaces."""
    for part in text.replace("+", ",").replace(" ", ",").split(","):
        if part.strip():
            yield part.strip().lower()
