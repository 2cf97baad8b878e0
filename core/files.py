"""Files that are either whole or absent.

Writers put bytes into a temporary neighbour, flush it to the disk and rename it: a reader never meets half a file,
and a full disk leaves the old content in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import ConfigError

_BLOCK_BYTES = 1 << 20


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically and durably. Raises `OSError` and leaves the old file when it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def sha256_file(path: Path) -> str:
    """Hex digest of the file's content, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_text(*parts: str) -> str:
    """Hex digest of several strings; the boundaries between them count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()


@contextmanager
def new_directory(path: Path, exclusive: bool = False) -> Iterator[Path]:
    """Yields a scratch directory that becomes `path` when the block ends well and vanishes when it does not.

    Two processes may race to make the same directory: the first rename wins and the second's work is dropped, so
    the content must depend on nothing but the name (a content hash). `exclusive` is for any other content: where `path`
    has appeared meanwhile it stays, and a `ConfigError` says where the work is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        try:
            os.replace(scratch, path)
        except OSError:
            if exclusive and os.path.lexists(path):
                kept = path.with_name(f"{path.name}.{os.getpid()}")
                os.replace(scratch, kept)
                reason = f"appeared while it was being made, and was left as it is; the finished work is in {kept}"
                raise ConfigError("out", str(path), reason) from None
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
