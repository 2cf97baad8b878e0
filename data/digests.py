"""Digests of files, kept with the state of each file, so that at the next start only what has changed is read again.

The state is what git's index compares: size, times of the last change of content and of anything else, and the number
of the inode. A file that was changed just before it was read may change again within the clock's tick, so its digest is
not trusted later.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from core.files import is_local, sha256_file, write_bytes
from data.files import UnreadableFile, reading

_TICK_NS = 2 * 10**9
"""Time in which two changes may get the same time stamp: FAT has the coarsest."""
_STATE = ("size", "content_ns", "change_ns", "inode")
_TYPES = {"owner": "string", "path": "string", "sha256": "string", **dict.fromkeys(_STATE, "int64")}
State = tuple[int, ...]


class FileDigests:
    """The digests of files and of the files that they name. `save` keeps those that were asked for."""

    def __init__(self, record: Path) -> None:
        self.record = record
        self._then: dict[str, tuple[str, State]] = {}
        self._named_then: dict[str, list[str]] = {}
        self._now: dict[str, tuple[str, State]] = {}
        self._named: dict[str, list[str]] = {}
        self._is_new: dict[str, bool] = {}
        self._load()

    def of(self, path: Path) -> str:
        """Return the SHA-256 of a file. Raises `OSError`."""
        name = str(path)
        if name not in self._now:
            state, known = _state(path), self._then.get(name)
            self._is_new[name] = known is None or known[1] != state or -1 in state
            digest = sha256_file(path) if known is None or self._is_new[name] else known[0]
            self._now[name] = digest, state
        return self._now[name][0]

    def named(self, path: Path, read: Callable[[], Iterable[str]]) -> list[str]:
        """Return the names of files in a file whose digest was asked for: what `read` returns, sorted, or if the file
        has not changed what it returned then.
        """
        name = str(path)
        is_known = not self._is_new[name] and name in self._named_then
        self._named[name] = self._named_then[name] if is_known else sorted(set(read()))
        return self._named[name]

    def save(self) -> None:
        """Write the record if it has changed. Without space or permission the next start reads the files again."""
        if self._now == self._then and self._named == self._named_then:
            return
        import pyarrow.parquet

        rows = [("", path, digest, *state) for path, (digest, state) in self._now.items()]
        rows += [(owner, name, "", 0, 0, 0, 0) for owner, names in self._named.items() for name in ["", *names]]
        columns = zip(*rows, strict=True) if rows else [()] * len(_TYPES)
        schema = pyarrow.schema(list(_TYPES.items()))
        table = pyarrow.table(dict(zip(_TYPES, columns, strict=True)), schema)
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        try:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.record, sink.getvalue().to_pybytes())
        except OSError:
            return

    def _load(self) -> None:
        """Read the record; a damaged one counts as none."""
        if not self.record.is_file():
            return
        import pyarrow.parquet

        try:
            with reading():
                rows = pyarrow.parquet.read_table(self.record, columns=list(_TYPES)).to_pylist()
        except UnreadableFile:
            return
        for row in rows:
            if row["owner"]:
                names = self._named_then.setdefault(row["owner"], [])
                names += [row["path"]] if row["path"] else []
            else:
                self._then[row["path"]] = row["sha256"], tuple(row[key] for key in _STATE)


def _state(path: Path) -> State:
    """Return the state of a file, with -1 if a change of it could go unseen: it is not local, or has just changed."""
    if not is_local(path):
        return (-1,) * len(_STATE)
    found: Any = os.stat(path)
    times = found.st_mtime_ns, found.st_ctime_ns
    is_settled = max(times) < time.time_ns() - _TICK_NS
    return (found.st_size if is_settled else -1, *times, found.st_ino)
