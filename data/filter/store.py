"""Store the shards of a stage: parquet files that are complete or absent, and a manifest that is written last.

Each shard of a stage is made by one process. The key of a stage is a hash of its settings and inputs; a directory with
another key is rejected. A table is a `pyarrow.Table`.
"""

from __future__ import annotations

import errno
import re
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
_HASH = re.compile("[0-9a-f]{64}")


class Workers(Protocol):
    """The processes of a filter, which share a file system. All call these methods in the same order."""

    rank: int
    size: int

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sum over all processes, element by element."""
        ...

    def agree(self, error: LeviathanError | None) -> None:
        """Wait for all processes. If one has an error, raise it on all of them."""
        ...


class OneWorker:
    rank, size = 0, 1

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return values

    def agree(self, error: LeviathanError | None) -> None:
        if error is not None:
            raise error


def local_items(items: Sequence[T], workers: Workers) -> list[T]:
    """Return the items of this process; every item belongs to one process."""
    return list(items[workers.rank :: workers.size])


@contextmanager
def barrier(workers: Workers) -> Iterator[None]:
    """Wait at the end of the block until all processes reach it. A `LeviathanError` of one process is raised on all."""
    error = None
    try:
        yield
    except LeviathanError as found:
        error = found
    workers.agree(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `DataError` with advice if the path cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror or error}): {_advice(error)}") from None


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Raise `DataError` with advice if the file is missing or damaged."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pyarrow.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}): {advice}") from None


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run again to resume"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "a file is where a folder must be, or the reverse: move it, or choose another out="
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable, or choose another out="
    return "fix that and run again to resume"


class StageStore:
    """The directory of one stage. `made_of`: the settings behind `key`; a message names those that have changed."""

    def __init__(self, directory: Path, key: str, made_of: Mapping[str, Any]) -> None:
        self.directory, self.key, self.made_of = directory, key, dict(made_of)
        self.is_complete = False
        """Whether no shard was missing when the stage was opened, or the missing ones have been made since."""

    def open(self, workers: Workers, content: str | None = None) -> None:
        """Create the directory, or reuse it. Raises `ConfigError` if it holds a stage with another key. `content`: a
        hash of inputs that may change while the key stays the same; a stage with another hash is rebuilt.
        """
        path = self.directory / KEY
        with barrier(workers):
            if workers.rank == 0:
                with writing(path):
                    if self._aside.exists() and not self.directory.exists():
                        self._aside.rename(self.directory)
                    self.directory.mkdir(parents=True, exist_ok=True)
                    if not path.exists() or self._is_stale(content):
                        given = {} if content is None else {"content": content}
                        write_json(path, {"key": self.key, "made_of": self.made_of, **given})
        with barrier(workers):  # no process may make a shard before all have checked which are missing
            self.check_key()
            self.is_complete = self.has_manifest and all(map(self.has, self.shards))

    @property
    def _aside(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}-{self.key[:16]}")

    def set_aside(self) -> None:
        """Rename the directory, so that a stage with another key can be made. `open` with this key takes it back."""
        if self._stored().get("key") == self.key:
            with writing(self._aside):
                self.directory.rename(self._aside)

    def check_key(self) -> None:
        """Raise `ConfigError` if the directory holds a stage with another key."""
        if (found := self._stored()) and found["key"] != self.key:
            raise ConfigError("out", str(self.directory), self._difference(found.get("made_of", {})))

    def _stored(self) -> dict[str, Any]:
        """Read the key file, {} if there is none."""
        if not (self.directory / KEY).exists():
            return {}
        found: dict[str, Any] = self.read_json(KEY, {"key": str, "made_of?": {}})
        return found

    def _is_stale(self, content: str | None) -> bool:
        """Return whether the stored stage has this key but other content. If so, remove its files, but not `KEY`."""
        found = self._stored()
        if found["key"] != self.key or found.get("content") == content:
            return False
        for path in self.directory.iterdir():
            if path.name != KEY:
                path.unlink()
        return True

    def _difference(self, made_of: Mapping[str, Any]) -> str:
        found = differences(made_of, self.made_of)
        changed = [f"the {key.replace('_', ' ')}" for key, (_, new) in found.items() if _HASH.search(str(new))]
        words = {key: ("the default" if old is None else old, new) for key, (old, new) in found.items()}
        shown = [f"{key}={old} (now {new})" for key, (old, new) in words.items() if not _HASH.search(str(new))]
        more = f" and {len(shown) - _SHOWN_DIFFERENCES} more" if len(shown) > _SHOWN_DIFFERENCES else ""
        made = ", ".join(shown[:_SHOWN_DIFFERENCES]).replace("\n", "\\n")
        why = [f"was made with {made or 'other settings'}{more}"] if made or not changed else []
        why += [f"{' and '.join(changed)} changed since it was made"] if changed else []
        return f"{', and '.join(why)}; remove that folder (earlier stages stay), or choose another out="

    @property
    def has_manifest(self) -> bool:
        return (self.directory / MANIFEST).exists()

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.parquet"

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def write(self, name: str, table: Any) -> None:
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        with writing(self.path(name)):
            write_bytes(self.path(name), sink.getvalue().to_pybytes())

    def write_json(self, name: str, value: Any) -> None:
        with writing(self.directory / name):
            write_json(self.directory / name, value)

    def read(self, name: str, columns: list[str] | None = None) -> Any:
        """Read a shard's table. Raises `DataError` if it is damaged."""
        import pyarrow.parquet

        with reading(self.path(name), "remove it and run again"):
            return pyarrow.parquet.read_table(self.path(name), columns=columns)

    def has_column(self, name: str, column: str) -> bool:
        """Return whether a shard has the column. Raises `DataError` if the shard is damaged."""
        import pyarrow.parquet

        with reading(self.path(name), "remove it and run again"):
            return column in pyarrow.parquet.read_schema(self.path(name)).names

    def read_json(self, name: str, shape: Any = object) -> Any:
        """Read a JSON file of the stage. Raises `DataError` if it is damaged or has not the shape."""
        with reading(self.directory / name, f"remove {self.directory} and run again"):
            return read_json(self.directory / name, shape)

    def close(self, shards: dict[str, int], workers: Workers) -> None:
        """Write the manifest, once all shards exist. `shards`: the number of rows of each shard."""
        with barrier(workers):
            if workers.rank == 0 and not self.has_manifest:
                self.write_json(MANIFEST, {"key": self.key, "shards": shards})
        self.is_complete = True

    @property
    def shards(self) -> dict[str, int]:
        """Number of rows of each shard of a complete stage, in order."""
        shards: dict[str, int] = self.read_json(MANIFEST, {"shards": {str: int}})["shards"]
        return shards

    def make(self, shards: dict[str, int], workers: Workers, shard: Callable[[str], Any]) -> None:
        """Make the missing shards of this open stage, each by one process: `shard` returns the table of a shard."""
        with barrier(workers):
            for name in local_items(list(shards), workers):
                if not self.has(name):
                    table = shard(name)
                    if len(table) != shards[name]:
                        raise DataError(f"{self.path(name)}: {len(table)} rows for {shards[name]} records")
                    self.write(name, table)
        self.close(shards, workers)

    def tables(self, columns: list[str] | None = None) -> Iterator[tuple[str, Any]]:
        for name in self.shards:
            yield name, self.read(name, columns)
