"""Store the answers of endpoints in files that all commands share, so that no request is sent twice."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from core.files import misfit, parse_json, write_all
from data.filter.store import writing


class AnswerCache:
    """Answers by request key, as lines of JSON in one file. Any number of processes share it.

    A process claims a request by a lock on one byte of the file, which the kernel releases when the process ends. A
    line that a kill or a full disk truncated is skipped. Only the places of answers are in memory, 0.25 GB per million.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, int] = {}
        self._end, self._lock = 0, threading.Lock()

    @cached_property
    def _reader(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return open(self.path, "a+b")

    def refresh(self) -> None:
        """Read the lines that this or another process has added since the last call."""
        with self._lock, writing(self.path):
            self._reader.seek(self._end)
            for line in self._reader:
                if not line.endswith(b"\n"):
                    break
                if (entry := _entry(line)) is not None:
                    self._places[entry["key"]] = self._end
                self._end += len(line)

    def __contains__(self, key: str) -> bool:
        """Return whether the file had an answer at the last `refresh`."""
        return key in self._places

    def get(self, key: str) -> str | None:
        """Return the answer that the file had at the last `refresh`."""
        if key not in self:
            return None
        with self._lock, writing(self.path):
            self._reader.seek(self._places[key])
            entry = _entry(self._reader.readline())
        return entry["answer"] if entry is not None and entry["key"] == key else None

    def add(self, key: str, answer: str) -> None:
        """Append an answer to the file. Raises `DataError` if it cannot be written."""
        line = json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        with writing(self.path), open(self.path, "a+b", buffering=0) as file:
            _lock_byte(file, 0, fcntl.F_OFD_SETLKW)
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line  # end the line of a killed process
            write_all(file, memoryview(line))

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yield whether nobody else is sending this request. If so, nobody else can claim it until the block ends."""
        with writing(self.path):
            file = open(self.path, "ab")  # noqa: SIM115 - an error of the block is not one of writing
            mine = _lock_byte(file, 1 + int(key[:15], 16), fcntl.F_OFD_SETLK)
        with file:
            yield mine


def _entry(line: bytes) -> dict[str, str] | None:
    with suppress(ValueError):
        entry: dict[str, str] = parse_json(line)
        return None if misfit(entry, {"key": str, "answer": str}) else entry
    return None


def _lock_byte(file: Any, place: int, command: int) -> bool:
    """Lock a byte, which may lie after the end of the file, until the file is closed. Return whether that succeeded.

    The lock belongs to the open file, in contrast to that of `fcntl.lockf`, which belongs to the process. The bytes are
    a `struct flock` (Linux, man 2 fcntl).
    """
    try:
        fcntl.fcntl(file, command, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True
