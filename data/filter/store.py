"""The shards of a stage: parquet files that are whole or absent, and a manifest that is written last.

A stage is made of numbered shards, each by one process. Its key says what it is made of; a stage of another key is
never gone on with. Columns are those of `pyarrow` tables.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.config import differences
from core.errors import ConfigError, DataError, LeviathanError
from core.files import read_json, write_bytes, write_json

T = TypeVar("T")

MANIFEST, KEY = "manifest.json", "key.json"
_SHOWN_DIFFERENCES = 3


class Workers(Protocol):
    """The processes that filter together; they share a file system. All call these in the same order."""

    rank: int
    size: int

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Over all of them, element by element."""
        ...

    def agree(self, error: LeviathanError | None) -> None:
        """Wait until all are here; where one brings an error, raise it on all."""
        ...


class OneWorker:
    rank, size = 0, 1

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return values

    def agree(self, error: LeviathanError | None) -> None:
        if error is not None:
            raise error


def share(items: Sequence[T], workers: Workers) -> list[T]:
    """Those of the items that this process does; every item is some process's."""
    return list(items[workers.rank :: workers.size])


@contextmanager
def together(workers: Workers) -> Iterator[None]:
    """Each process does its share, and then all go on, or none does. Every one of them has to come here."""
    error = None
    try:
        yield
    except LeviathanError as found:
        error = found
    workers.agree(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `DataError` where the disk is full or the place cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror or error}): {_advice(error)}") from None


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run again to go on"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return (
            "a file stands where a folder has to be, or a folder where a file has to: move it, or choose another out="
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "let it be written to, or choose another out="
    return "mend that and run again to go on"


def _given(content: str | None) -> dict[str, str]:
    return {} if content is None else {"content": content}


def _line(value: Any) -> str:
    """On one line, whatever it holds."""
    return str(value).replace("\n", "\\n")


class StageStore:
    """One stage's directory. `made_of` says for people what `key` is a hash of."""

    def __init__(self, directory: Path, key: str, made_of: Mapping[str, Any]) -> None:
        self.directory, self.key, self.made_of = directory, key, dict(made_of)
        self.is_whole = False
        """Whether nothing was missing when it was opened, or all has been made since."""

    def open(self, workers: Workers, content: str | None = None) -> None:
        """Make the directory, or go on with it. Raises `ConfigError` where it holds a stage of another key. `content`:
        a hash of what it is made of that may change under the same key; a stage of other content is made anew.
        """
        path = self.directory / KEY
        with together(workers):
            if workers.rank == 0:
                with writing(path):
                    self.directory.mkdir(parents=True, exist_ok=True)
                    if not path.exists() or self._is_stale(content):
                        write_json(path, {"key": self.key, "made_of": self.made_of, **_given(content)})
        with together(workers):  # or one would already see what another makes next, and they would go different ways
            self.refuse_other()
            self.is_whole = self.has_manifest and all(map(self.has, self.shards))

    def refuse_other(self) -> None:
        """Raises `ConfigError` where the directory holds a stage of another key."""
        if not (self.directory / KEY).exists():
            return
        found = self.read_json(KEY)
        if found["key"] != self.key:
            raise ConfigError("out", str(self.directory), self._difference(found.get("made_of", {})))

    def _is_stale(self, content: str | None) -> bool:
        """Whether the stage was of this key and of other content; then only its key is left, until that is replaced."""
        found = self.read_json(KEY)
        if found["key"] != self.key or found.get("content") == content:
            return False
        for path in self.directory.iterdir():
            if path.name != KEY:
                path.unlink()
        return True

    def _difference(self, made_of: Mapping[str, Any]) -> str:
        found = list(differences(made_of, self.made_of).items())
        shown = ", ".join(f"{key}={_line(old)} (now {_line(new)})" for key, (old, new) in found[:_SHOWN_DIFFERENCES])
        more = f" and {len(found) - _SHOWN_DIFFERENCES} more" if len(found) > _SHOWN_DIFFERENCES else ""
        shown = shown or "other settings"
        return f"was made with {shown}{more}; choose another out=, or remove it to have it made anew"

    @property
    def has_manifest(self) -> bool:
        return (self.directory / MANIFEST).exists()

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.parquet"

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def write(self, name: str, table: Any) -> None:
        """Raises `DataError` where the disk is full."""
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        with writing(self.path(name)):
            write_bytes(self.path(name), sink.getvalue().to_pybytes())

    def write_json(self, name: str, value: Any) -> None:
        """Raises `DataError` where the disk is full."""
        with writing(self.directory / name):
            write_json(self.directory / name, value)

    def read(self, name: str, columns: list[str] | None = None) -> Any:
        """A shard's table. Raises `DataError` where it is damaged."""
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(self.path(name), columns=columns)
        except (OSError, pyarrow.ArrowException) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{self.path(name)} cannot be read ({reason}): remove it and run again") from None

    def read_json(self, name: str) -> Any:
        """Raises `DataError` where the file is damaged."""
        path = self.directory / name
        try:
            return read_json(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): remove {self.directory} and run again") from None

    def remove(self) -> None:
        """With all that is in it."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self, shards: dict[str, int], workers: Workers) -> None:
        """All shards are there: say so. `shards`: rows of each."""
        with together(workers):
            if workers.rank == 0 and not self.has_manifest:
                self.write_json(MANIFEST, {"key": self.key, "shards": shards})
        self.is_whole = True

    @property
    def shards(self) -> dict[str, int]:
        """Rows of each shard of a whole stage, in order."""
        shards: dict[str, int] = self.read_json(MANIFEST)["shards"]
        return shards

    def make(self, shards: dict[str, int], workers: Workers, shard: Callable[[str], Any]) -> None:
        """Make each missing shard of this open stage, every process its own share of them."""
        with together(workers):
            for name in share(list(shards), workers):
                if not self.has(name):
                    table = shard(name)
                    if len(table) != shards[name]:
                        raise DataError(f"{self.path(name)}: {len(table)} rows were made of {shards[name]} records")
                    self.write(name, table)
        self.close(shards, workers)

    def tables(self, columns: list[str] | None = None) -> Iterator[tuple[str, Any]]:
        for name in self.shards:
            yield name, self.read(name, columns)
