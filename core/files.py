"""Files that are either whole or absent.

Writers put bytes into a temporary neighbour, flush it to the disk and rename it: a reader never meets half a file,
and a full disk leaves the old content in place.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.registry import known_implementations

from core.errors import ConfigError

_BLOCK_BYTES = 1 << 20


def locate(text: str) -> Path:
    """The place that a path or a URL (`s3://bucket/folder`, any filesystem of fsspec) names, used like a `Path`.

    Raises `ConfigError` where what that filesystem needs is not installed.
    """
    if "://" not in text:
        return Path(text).expanduser()
    from upath import UPath

    try:
        place: Any = UPath(text)
        _ = place.fs
    except (ImportError, ValueError) as error:
        protocol = text.partition("://")[0]
        advice = known_implementations.get(protocol, {}).get("err", f"no filesystem is called {protocol!r}")
        raise ConfigError("", text, advice) from error
    return place


def is_local(path: Path) -> bool:
    """Whether `path` is this machine's own: elsewhere files are written whole or not at all by the store itself."""
    return isinstance(path, Path)


def open_raw(path: Path, mode: str) -> Any:
    """A binary file ("rb" or "wb") without a buffer of ours where it is local."""
    return open(path, mode, buffering=0) if is_local(path) else path.open(mode)


def files_in(place: Path) -> list[Path]:
    """Every file in a folder and those below it, sorted; of a store elsewhere in one listing."""
    if is_local(place):
        return sorted(path for path in place.rglob("*") if path.is_file())
    return _of_store(place, "find")


def files_like(pattern: Path) -> list[Path]:
    """Files whose names a pattern with `*`, `?`, `[]` or `**` fits, sorted."""
    if is_local(pattern):
        return sorted(Path(found) for found in glob.glob(str(pattern), recursive=True) if Path(found).is_file())
    return _of_store(pattern, "glob")


def _of_store(place: Path, how: str) -> list[Path]:
    store: Any = place
    found = getattr(store.fs, how)(store.path, detail=True)
    return [locate(store.fs.unstrip_protocol(name)) for name, info in sorted(found.items()) if info["type"] == "file"]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """What readers of columns take: a local file's name, which they map themselves, or an open file of a store."""
    if is_local(path):
        yield path
    else:
        with path.open("rb") as file:
            yield file


def remove_tree(path: Path) -> None:
    """Remove a directory with what is in it, if it is there."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        store: Any = path
        store.fs.rm(store.path, recursive=True)


def append_json_line(path: Path, value: Any) -> None:
    """One more line at the end. A kill or a full disk may cut it short: who reads such a file bears with that."""
    with open(path, "a") as file:
        file.write(json.dumps(value) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically and durably. Raises `OSError` and leaves the old file when it cannot."""
    if not is_local(path):
        path.write_bytes(content)
        return
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
    with path.open("rb") as file:
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
