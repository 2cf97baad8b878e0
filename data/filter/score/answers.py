"""Store the answers of endpoints in a folder that all commands share, so that no request is sent twice."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from core.files import misfit, parse_json, write_all
from data.filter.store import writing

_APPEND = 0
"""The byte of the file that is locked while a line is appended. The bytes from 1 on are the claims of requests."""


class AnswerCache:
    """Answers by key, as lines of JSON in one file. Any number of processes share it, also those of other commands.

    A process claims a request by a lock on one byte of the file, which the kernel releases when the process ends. A
    line that a kill or a full disk truncated is skipped. Only the places of answers are in memory, 0.25 GB per million.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, int] = {}
        self._end = 0
        self._claimed: set[int] = set()
        self._files: tuple[IO[bytes], Any] | None = None
        self._lock = threading.Lock()

    def _opened(self) -> tuple[IO[bytes], Any]:
        if self._files is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writer = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as this object
            self._files = open(self.path, "rb"), writer  # noqa: SIM115
        return self._files

    def refresh(self) -> None:
        """Read the lines that this or another process has added since the last call."""
        with self._lock, writing(self.path):
            reader, _ = self._opened()
            reader.seek(self._end)
            for line in reader:
                if not line.endswith(b"\n"):
                    break
                with suppress(ValueError):
                    entry = parse_json(line)
                    if not misfit(entry, {"key": str, "answer": (str, int)}):
                        self._places[entry["key"]] = self._end
                self._end += len(line)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def get(self, key: str) -> Any:
        """Return the answer, or None if none was stored when the file was last read."""
        if key not in self._places:
            return None
        with self._lock, writing(self.path):
            reader, _ = self._opened()
            reader.seek(self._places[key])
            with suppress(ValueError, TypeError, KeyError):  # the file was changed by hand
                entry = parse_json(reader.readline())
                return entry["answer"] if entry["key"] == key else None
        return None

    def add(self, key: str, answer: Any) -> None:
        """Append an answer to the file. Raises `DataError` if it cannot be written."""
        line = json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        with self._lock, writing(self.path):
            reader, writer = self._opened()
            _lock_byte(writer, fcntl.F_WRLCK, _APPEND, fcntl.F_OFD_SETLKW)
            try:
                if size := os.fstat(writer.fileno()).st_size:
                    reader.seek(size - 1)
                    line = line if reader.read(1) == b"\n" else b"\n" + line  # after the line of a killed process
                write_all(writer, memoryview(line))
            finally:
                _lock_byte(writer, fcntl.F_UNLCK, _APPEND)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yield True if nobody else is sending this request; nobody else can claim it until the end of the block."""
        place = 1 + int(key[:15], 16)
        with self._lock, writing(self.path):
            _, writer = self._opened()
            # threads share the lock of the file, so they need the set
            mine = place not in self._claimed and _lock_byte(writer, fcntl.F_WRLCK, place)
            if mine:
                self._claimed.add(place)
        try:
            yield mine
        finally:
            if mine:
                with self._lock:
                    self._claimed.remove(place)
                    _lock_byte(writer, fcntl.F_UNLCK, place)


def _lock_byte(file: Any, kind: int, place: int, command: int = fcntl.F_OFD_SETLK) -> bool:
    """Lock or unlock one byte for this open file, unlike `fcntl.lockf`, which locks it for the process. Return whether
    it succeeded. The bytes are `struct flock` (Linux, man 2 fcntl), and may lie after the end of the file.
    """
    try:
        fcntl.fcntl(file, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, place, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True
