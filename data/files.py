"""Find and read jsonl, parquet and text files, local or in any filesystem of fsspec, and data sets of `datasets`.

The suffix determines the format. A text file is one document. `UnreadableFile` says in one line what is wrong.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import ConfigError, OneLineError
from core.files import files_in, files_like, is_local, locate, opened, sha256_file, sha256_text

_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
SUFFIXES = (*_JSONL_SUFFIXES, ".parquet", *_TEXT_SUFFIXES)
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BATCH_ROWS = 1024
MOST_BYTES = 32 * 2**20
"""Largest document, in bytes. To tokenise one takes fifty times its size in memory."""
_SAVED = ("state.json", "dataset_dict.json")
"""Files that `save_to_disk` of the `datasets` library writes into a folder."""


class UnreadableFile(OneLineError):
    """A file is missing, truncated, damaged or not in the format of its suffix. The message is one line."""


class FileFormat(Enum):
    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"


def file_format(path: Path) -> FileFormat | None:
    """Return the format of a file by its suffix, or None if the suffix is unknown."""
    if path.name.endswith(_JSONL_SUFFIXES):
        return FileFormat.jsonl
    if path.suffix == ".parquet":
        return FileFormat.parquet
    return FileFormat.text if path.suffix in _TEXT_SUFFIXES else None


def find_files(pattern: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[tuple[str, Path]]:
    """List the files of a path, a folder (recursively) or a glob pattern in a fixed order, each with its name.

    Names are relative to the folder. Files with another suffix than `suffixes` are skipped in a folder. Raises
    `ConfigError` with an empty key if nothing is found, or if the path or the pattern leads to such a file.
    """

    def known(path: Path) -> bool:
        return path.name.endswith(suffixes) and path.name not in suffixes

    place = locate(pattern)
    try:
        if place.is_file():
            found = [(place.name, place)]
        elif place.is_dir():
            found = [(path.relative_to(place).as_posix(), path) for path in files_in(place) if known(path)]
        else:
            found = [(path.as_posix() if is_local(path) else str(path), path) for path in files_like(place)]
    except ValueError as error:  # a store does not take the name
        raise ConfigError("", pattern, str(error)) from None
    if not found:
        reason = "no such file or folder"
        if place.exists():
            kinds = "jsonl, parquet or tar" if ".tar" in suffixes else "jsonl, parquet or text"
            reason = f"the folder holds no {kinds} file" if place.is_dir() else "is neither file nor folder"
        raise ConfigError("", pattern, reason)
    for _, path in found:
        if not known(path):
            raise ConfigError("", str(path), "unknown suffix", suffixes)
    return found


def skipped_files(pattern: str) -> list[str]:
    """List the names of the files that `find_files` skips in a folder, except hidden ones."""
    place = locate(pattern)
    if not place.is_dir():
        return []
    names = [path.relative_to(place).as_posix() for path in files_in(place) if file_format(path) is None]
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def json_lines(
    path: Path, start: int = 0, stop: int | None = None, number: int = 1
) -> Iterator[tuple[int, int, bytes]]:
    """Yield for each line that is not blank its number (from 1), the offset of its first byte in the uncompressed file,
    and its bytes, without the line end and the file's byte order mark.

    Of a file that is not compressed, only the lines that begin from byte `start` on and before `stop` can be read.
    `number`: that of a line which begins at `start`, or 1 plus the line ends before it.
    """
    import pyarrow

    offset, codec = start, _CODECS.get(path.suffix)
    with reading(), path.open("rb") as raw:
        file: Any = io.BufferedReader(pyarrow.input_stream(raw, codec)) if codec else raw
        if start:
            file.seek(start - 1)
            while (cut := file.readline(MOST_BYTES)) and not cut.endswith(b"\n"):  # it began before `start`
                offset += len(cut)
            offset += len(cut) - 1
            number += offset > start
        lines = iter(partial(file.readline, MOST_BYTES + 1), b"")
        for number, line in enumerate(lines, start=number):  # noqa: B020
            if stop is not None and offset >= stop:
                return
            if len(line) > MOST_BYTES:
                raise UnreadableFile(f"line {number} has more than {MOST_BYTES >> 20} MiB: split its text")
            mark = len(codecs.BOM_UTF8) if offset == 0 and line.startswith(codecs.BOM_UTF8) else 0
            if line[mark:].strip():
                yield number, offset + mark, line[mark:].rstrip(b"\r\n")
            offset += len(line)


def read_document(path: Path) -> bytes:
    """Return the content of a file that is one document. Raises `UnreadableFile` if it is too large."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UnreadableFile(f"has more than {MOST_BYTES >> 20} MiB: split its text")
    return content


@contextmanager
def open_parquet(path: Path, buffer_bytes: int = 0) -> Iterator[Any]:
    """Open a `ParquetFile`. Page checksums are verified if the file has them. `buffer_bytes`: read a column of a row
    group in pieces of this size; 0: at once.
    """
    import pyarrow.parquet

    with reading(), opened(path) as source:
        yield pyarrow.parquet.ParquetFile(
            source, buffer_size=buffer_bytes, pre_buffer=not buffer_bytes, page_checksum_verification=True
        )


def read_rows(path: Path, errors: str = "strict") -> Iterator[tuple[int, Any]]:
    """Yield each record with its number in the file: a line of JSON as bytes (numbered from 1), a row of a table as a
    dictionary (from 0), or a text file as {"text": ...}. `errors`: how to decode a text file, as in `bytes.decode`.
    """
    match file_format(path):
        case FileFormat.jsonl:
            yield from ((number, content) for number, _, content in json_lines(path))
        case FileFormat.parquet:
            with open_parquet(path) as table:
                yield from enumerate(row for batch in table.iter_batches(_BATCH_ROWS) for row in batch.to_pylist())
        case FileFormat.text:
            with reading():
                yield 0, {"text": read_document(path).decode(errors=errors)}
        case None:
            raise UnreadableFile("unknown suffix")


def read_rows_from(path: Path, start: int, number: int) -> Iterator[tuple[int, Any]]:
    """Yield what `read_rows` does, from a byte of plain JSON lines or a row group of a table on; see `json_lines`."""
    if path.suffix != ".parquet":
        yield from ((place, content) for place, _, content in json_lines(path, start, None, number))
        return
    with open_parquet(path) as table:
        batches = table.iter_batches(_BATCH_ROWS, row_groups=range(start, table.num_row_groups))
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=number)


def row_group_sizes(path: Path) -> list[int]:
    """Return the number of rows of each group of a table."""
    with open_parquet(path) as table:
        return [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]


def stream_dataset(name: str, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set in its own order: from the hub by name, or from a folder, including one that
    `save_to_disk` wrote. Raises `UnreadableFile`, and `ConfigError` (key `split`) for a split that was not saved.
    """
    import datasets

    with reading(datasets.exceptions.DatasetsError):
        yield from _open_dataset(name, subset, split)


def stream_tables(name: str, subset: str | None, split: str, rows: int) -> Iterator[Any]:
    """Yield what `stream_dataset` does as tables of Arrow with at most `rows` rows. Pictures and videos stay structs of
    bytes and path, as stored: nothing is decoded or fetched.
    """
    import datasets

    with reading(datasets.exceptions.DatasetsError):
        yield from _open_dataset(name, subset, split).with_format("arrow").iter(rows)


def _open_dataset(name: str, subset: str | None, split: str) -> Any:
    import datasets

    folder = Path(name).expanduser()
    if not any((folder / file).is_file() for file in _SAVED):
        place = str(folder) if folder.is_dir() else name
        return datasets.load_dataset(place, subset, split=split, streaming=True)
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
    if split not in splits:
        raise ConfigError("split", split, f"{name} was saved without it", sorted(splits))
    return splits[split]


def dataset_fingerprint(name: str, subset: str | None, split: str) -> str:
    """Hash the name of a data set and, if it is a folder, its files. Content on the hub may change under its name."""
    folder = Path(name).expanduser()
    return sha256_text(name, str(subset), split, *map(sha256_file, files_in(folder) if folder.is_dir() else []))


@contextmanager
def reading(*errors: type[Exception]) -> Iterator[None]:
    """Turn the errors of reading a file into `UnreadableFile`, and `errors` too."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException, *errors) as error:
        raise UnreadableFile(next(iter(str(error).splitlines()), type(error).__name__)) from None
