"""Load the text and the encoded pictures that a record names. Each refusal is one line."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import OneLineError
from core.files import is_local
from data.images.parts import ImagePart, PartsConfig, VideoPart


class RefusedRecord(OneLineError):
    """A record cannot become a document."""


@dataclass(frozen=True)
class Reference:
    """A picture or video of a record: bytes, a path, or both as {"bytes": ..., "path": ...}. `place`: where it is."""

    value: Any
    place: str
    is_video: bool = False

    @property
    def path(self) -> str | None:
        """The path of a picture that is not in the record."""
        value = self.value
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else None
        return value if isinstance(value, str) else None


def as_text(value: Any, place: str) -> str:
    """Return a text of a record, in UTF-8; an empty one for null."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise RefusedRecord(f"{place} is not UTF-8 text (byte {error.start})") from None
    if not isinstance(value, str | None):
        raise RefusedRecord(f"{place} is a {type(value).__name__}, not text")
    if value and re.search("[\ud800-\udfff]", value):  # JSON may escape half of a surrogate pair
        raise RefusedRecord(f"{place} holds half of a surrogate pair, which is not text")
    return value or ""


def check_count(count: int, most: int) -> None:
    if count > most:
        raise RefusedRecord(f"has {count} pictures and videos, more than data.images.max_images={most}")


def check_size(size: int, name: str, largest: int) -> None:
    if size > largest:
        raise RefusedRecord(f"{name} has {size} bytes, more than largest_bytes={largest}")
    if size == 0:
        raise RefusedRecord(f"{name} is empty")


def load(reference: Reference, folder: Path | None, config: PartsConfig, prefix: str = "") -> ImagePart | VideoPart:
    """Return the part with its bytes. Where there are bytes, the path is only a name. Else it starts at `folder` (None:
    there must be bytes), once `prefix` is removed.
    """
    value: Any = reference.value
    path: Any = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        value, path = None, value
    if not isinstance(path, str | None) or not isinstance(value, bytes | None):
        kinds = sorted({type(one).__name__ for one in (value, path) if one is not None})
        raise RefusedRecord(f"{reference.place} is neither bytes nor a path, but of type {' and '.join(kinds)}")
    if value is None and path is None:
        raise RefusedRecord(f"{reference.place} has neither bytes nor a path")
    name = as_text(path, f"the path of {reference.place}") or reference.place
    if value is None:
        if folder is None:
            raise RefusedRecord(f"{name} is not in the data set, only its name: nothing is fetched; store the bytes")
        value = read_inside(folder, (path or "").removeprefix(prefix), config.largest_bytes)
    check_size(len(value), name, config.largest_bytes)
    return VideoPart(value, name) if reference.is_video else ImagePart(value, name)


def read_inside(folder: Path, name: str, largest: int) -> bytes:
    """Return the content of a regular file below a folder, of at most `largest` bytes. Raises `RefusedRecord`.

    URLs, absolute names, names with `..`, and links that lead out of the folder are refused before anything is opened.
    """
    with _naming(name):
        return _read_local(folder, name, largest) if is_local(folder) else _read_remote(folder, name, largest)


def find_inside(folder: Path, name: str, largest: int) -> Path:
    """Return the path of the file that `read_inside` would read. Raises as it does."""
    with _naming(name):
        path = _resolved(folder, name) if is_local(folder) else _existing(folder, name)
        check_size(path.stat().st_size, name, largest)
        return path


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Refuse names that lead out of a folder, and what the system refuses in the block."""
    if "://" in name or name.lower().startswith("data:"):
        raise RefusedRecord(f"{name} is a URL: nothing is fetched; store the file in the folder of the source")
    if not name or "\0" in name:
        raise RefusedRecord(f"{name!r} is not the name of a file")
    if name.startswith("/") or ".." in name.split("/"):
        raise RefusedRecord(f"{name} is not a path inside the folder of the source")
    try:
        yield
    except FileNotFoundError:
        raise RefusedRecord(f"{name} does not exist in the folder of the source") from None
    except (OSError, RuntimeError) as error:  # `resolve` raises RuntimeError for a circle of links
        raise RefusedRecord(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _resolved(folder: Path, name: str) -> Path:
    path = (folder / name).resolve(strict=True)
    if not path.is_relative_to(folder.resolve()):
        raise RefusedRecord(f"{name} is a link that leaves the folder of the source")
    if not stat.S_ISREG(path.stat().st_mode):
        raise RefusedRecord(f"{name} is not a regular file")
    return path


def _read_local(folder: Path, name: str, largest: int) -> bytes:
    path = _resolved(folder, name)
    # what changed since is still refused: a link by its flag, a pipe or device after the opening, which does not wait
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise RefusedRecord(f"{name} is not a regular file")
        check_size(state.st_size, name, largest)
        return file.read(largest + 1)


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(name)
    return path


def _read_remote(folder: Path, name: str, largest: int) -> bytes:
    path = _existing(folder, name)
    check_size(path.stat().st_size, name, largest)
    with path.open("rb") as file:
        return file.read(largest + 1)
