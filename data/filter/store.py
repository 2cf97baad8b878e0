"""The shards of a stage: parquet files that are whole or absent, and a manifest that is written last.

A stage is made of numbered shards, each by one process. Its key says what it is made of; a stage of another key is
never gone on with. Columns are those of `pyarrow` tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, DataError
from core.files import read_json, write_bytes, write_json

MANIFEST, KEY = "manifest.json", "key.json"


class Workers(Protocol):
    """The processes that filter together; they share a file system. `sum` adds an int64 array over all of them."""

    rank: int
    size: int

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def wait(self) -> None:
        """Until all are here."""
        ...


class OneWorker:
    rank, size = 0, 1

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return values

    def wait(self) -> None:
        pass


class Stage:
    """One stage's directory."""

    def __init__(self, directory: Path, key: str, what: str) -> None:
        self.directory, self.key, self.what = directory, key, what

    def open(self, workers: Workers) -> None:
        """Make the directory, or go on with it. Raises `ConfigError` where it holds a stage of another key."""
        if workers.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / KEY
            if not path.exists():
                write_json(path, {"key": self.key, "what": self.what})
        workers.wait()
        found = read_json(self.directory / KEY)
        if found["key"] != self.key:
            reason = f"was made with {found['what']}, and now it would be {self.what}; choose another out=, or remove it"
            raise ConfigError("out", str(self.directory), reason)

    @property
    def is_whole(self) -> bool:
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
        try:
            write_bytes(self.path(name), sink.getvalue().to_pybytes())
        except OSError as error:
            reason = f"cannot write {self.path(name)} ({error.strerror}); what is done stays: free some space, run again"
            raise DataError(reason) from None

    def read(self, name: str, columns: list[str] | None = None) -> Any:
        """A shard's table. Raises `DataError` where it is damaged."""
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(self.path(name), columns=columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path(name)} cannot be read ({error}): remove it and run again") from None

    def close(self, shards: dict[str, int], workers: Workers) -> None:
        """All shards are there: say so. `shards`: rows of each."""
        workers.wait()
        if workers.rank == 0 and not self.is_whole:
            write_json(self.directory / MANIFEST, {"key": self.key, "shards": shards})
        workers.wait()

    @property
    def shards(self) -> dict[str, int]:
        """Rows of each shard of a whole stage, in order."""
        shards: dict[str, int] = json.loads((self.directory / MANIFEST).read_text())["shards"]
        return shards

    def make(self, shards: dict[str, int], workers: Workers, shard: Callable[[str], Any]) -> None:
        """Make each missing shard, every process its own share of them."""
        self.open(workers)
        for place, name in enumerate(shards):
            if place % workers.size == workers.rank and not self.has(name):
                table = shard(name)
                assert len(table) == shards[name], "a stage keeps the rows of the one before"
                self.write(name, table)
        self.close(shards, workers)

    def tables(self, columns: list[str] | None = None) -> Iterator[tuple[str, Any]]:
        for name in self.shards:
            yield name, self.read(name, columns)
