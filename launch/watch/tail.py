"""Read JSON lines as they are appended to a file, each byte once and in bounded memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from core.errors import UnreadableFileError
from core.files import check_regular
from train.run_directory import parse_lines

BLOCK = 4 << 20
"""Bytes read by one call of `poll`."""
LONGEST = 1 << 20
"""Bytes of the longest line that is kept. Longer ones are counted as damaged."""
_CHECKED = 64
"""Bytes before the offset that must be the same at the next call."""


class Tail:
    """Reads a file that grows, is replaced, is truncated or does not exist yet.

    `restarted`: whether the last call of `poll` found another file, so that all lines before are void. `behind`: bytes
    that are there and not read yet. `damaged`: number of complete lines that are not a JSON object. `problem`: why the
    file cannot be read, or an empty text. `size`: bytes of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restarted, self.problem = False, ""
        self._begin()

    def _begin(self) -> None:
        self.offset = self.behind = self.damaged = self.size = 0
        self._inode, self._before, self._skipping = 0, b"", False

    def poll(self) -> list[dict[str, Any]]:
        """Return the objects of the next complete lines, at most `BLOCK` bytes of them."""
        self.restarted, self.problem = False, ""
        try:
            check_regular(self.path)  # opening a named pipe would wait for a writer
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                file.seek(max(0, self.offset - len(self._before)))
                if file.read(len(self._before)) != self._before or self._inode not in (0, status.st_ino):
                    self.restarted = True
                    self._begin()
                self._inode, self.size = status.st_ino, status.st_size
                file.seek(self.offset)
                content = file.read(BLOCK)
        except FileNotFoundError:
            self.restarted = self.offset > 0
            self._begin()
            return []
        except (OSError, UnreadableFileError) as error:
            self.problem = (error.strerror if isinstance(error, OSError) else str(error)) or "cannot be read"
            return []
        return self._lines(content)

    def _lines(self, content: bytes) -> list[dict[str, Any]]:
        """Return the objects in the complete lines of `content`, and move the offset to their end."""
        end = content.rfind(b"\n") + 1
        if not end and len(content) > LONGEST:  # one line, which is dropped
            end, self._skipping = len(content), True
            parts: list[bytes] = []
        else:
            parts = content[:end].split(b"\n")[:-1]
            if parts and self._skipping:
                parts, self._skipping, self.damaged = parts[1:], False, self.damaged + 1
        self.offset += end
        self._before = (self._before + content[:end])[-_CHECKED:]
        self.behind = max(0, self.size - self.offset) if len(content) == BLOCK else 0
        found = []
        for part in parts:
            text = part.decode(errors="replace").strip()
            line = next(parse_lines(text), None) if len(part) <= LONGEST else None
            if line is not None:
                found.append(line)
            elif text:
                self.damaged += 1
        return found
