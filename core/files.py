"""Atomic file writes, and paths that may be URLs.

Writers fill a temporary file next to the target, flush it to disk and rename it. A reader never sees a partly written
file, and a full disk leaves the old content in place.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from fsspec.registry import known_implementations

from core.errors import ConfigError, UnreadableFileError, check_local

TEXT_LIMIT = 256 * 2**20
"""Largest size, in bytes, of a file that is read as one text: an index, a tokenizer, a summary."""


def locate(text: str) -> Path:
    """Return a path as a `Path`, and a URL of any fsspec filesystem (`s3://bucket/folder`) as the similar `UPath`.

    Raises `ConfigError` if a package that the filesystem needs is not installed.
    """
    if "://" not in text:
        return Path(text).expanduser()
    from upath import UPath

    try:
        path: Any = UPath(text)
        _ = path.fs
    except (ImportError, ValueError) as error:
        protocol = text.partition("://")[0]
        advice = known_implementations.get(protocol, {}).get("err", f"no filesystem is called {protocol!r}")
        raise ConfigError("", text, advice) from error
    return path


def local_path(key: str, text: str) -> Path:
    """Return the path of a key that names a place on this machine. Raises `ConfigError` for a URL and for no text."""
    check_local(key, text)
    return Path(text).expanduser()


def check_target(key: str, text: str, suffix: str) -> None:
    """Raise `ConfigError` if a file cannot be written in this place, so that no work is lost when it is, or if its name
    does not end in `suffix`: a mistyped place must not replace a file of another kind.
    """
    path = local_path(key, text)
    if path.suffix != suffix and (path.is_file() or not path.exists()):
        raise ConfigError(key, text, f"must end in {suffix}")
    if path.is_dir():
        raise ConfigError(key, text, "is a folder, but must be a file")
    if not path.parent.is_dir():
        raise ConfigError(key, text, f"the folder {path.parent} does not exist; make it, or choose another")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(key, text, "cannot be written: change the permissions, or choose another place")


def is_local(path: Path) -> bool:
    """Return whether `path` is a local `Path`, not a URL. Only local writes need a temporary file to be atomic."""
    return isinstance(path, Path)


def open_raw(path: Path, mode: str) -> Any:
    """Open a binary file ("rb" or "wb"), unbuffered if it is local."""
    return open(path, mode, buffering=0) if is_local(path) else path.open(mode)


def files_in(folder: Path) -> list[Path]:
    """Return every file below a folder, sorted. A remote folder is listed by one `find`, not folder by folder."""
    if is_local(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    return _in_store(folder, "find")


def files_like(pattern: Path) -> list[Path]:
    """Return the files that match a pattern with `*`, `?`, `[]` or `**`, sorted."""
    if is_local(pattern):
        return sorted(Path(found) for found in glob.glob(str(pattern), recursive=True) if Path(found).is_file())
    return _in_store(pattern, "glob")


def _in_store(path: Path, how: str) -> list[Path]:
    store: Any = path
    found = getattr(store.fs, how)(store.path, detail=True)
    return [locate(store.fs.unstrip_protocol(name)) for name, info in sorted(found.items()) if info["type"] == "file"]


def opened(path: Path) -> AbstractContextManager[Any]:
    """Yield the argument for a Parquet reader: a local path, which can be memory-mapped, or an open remote file."""
    return nullcontext(path) if is_local(path) else path.open("rb")


def remove_tree(path: Path) -> None:
    """Remove a directory and its contents, if it exists. Anything else in its place stays."""
    if is_local(path):
        if path.is_dir():  # `rmtree` would wait for the writer of a pipe
            shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        store: Any = path
        store.fs.rm(store.path, recursive=True)


def append_json_line(path: Path, value: Any) -> None:
    """Append `value` as a line of JSON. A kill or a full disk may truncate the line; readers must skip such a line."""
    append_text(path, json.dumps(value) + "\n")


def append_text(path: Path, text: str) -> None:
    """Append to a file, or to a pipe that has a reader. Without one, raise `OSError` instead of waiting for it."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(text)


def write_all(file: Any, content: memoryview) -> None:
    """Write all of `content`. One call of an unbuffered file's `write` may write only a part."""
    while len(content):
        content = content[file.write(content) :]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` atomically and durably. On `OSError` the old file stays.

    What is in the place of a file, such as `/dev/stdout` or a pipe, is written to and not replaced.
    """
    if not is_local(path):
        path.write_bytes(content)
        return
    if path.exists() and not path.is_file():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb") as file:
            file.write(content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
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


def read_text(path: Path, limit: int = TEXT_LIMIT, errors: str = "strict") -> str:
    """Return the content of a UTF-8 file of at most `limit` bytes. `errors`: as in `bytes.decode`.

    Raises `UnreadableFileError` for other content and for what is not a regular file: opening a FIFO would wait for a
    writer. Raises `OSError` as `open` does.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UnreadableFileError(f"{path}: is larger than {limit >> 20} MiB")
    try:
        return content.decode(errors=errors)
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path}: is not UTF-8 text (byte {error.start:,})") from None


def check_regular(path: Path) -> None:
    """Raise `UnreadableFileError` for a local path that is not a regular file, and `OSError` for a missing one."""
    if is_local(path) and (problem := _irregular(path.stat().st_mode)):
        raise UnreadableFileError(f"{path}: is {problem}, but must be a file")


def _irregular(mode: int) -> str | None:
    """Return what a path with this mode is, or None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket"}
    return next((name for test, name in kinds.items() if test(mode)), "a device")


def read_json(path: Path, shape: Any = object) -> Any:
    """Read a file of JSON. Raises `UnreadableFileError` (a `ValueError`) if it does not parse or has not the `shape`
    (see `misfit`), and `OSError`.
    """
    text = read_text(path)
    try:
        value = parse_json(text)
        if problem := misfit(value, shape):
            raise ValueError(problem)
        return value
    except ValueError as error:
        raise UnreadableFileError(f"{path}: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """Return the value of a text of JSON. Raises `ValueError`, for deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None


def misfit(value: Any, shape: Any, place: str = "it") -> str:
    """Return in words the first difference of a value of JSON from a shape, or an empty string.

    A shape is `int` (of 64 bits), `float` (any number), `str` (in UTF-8), `bool`, `None` or `object` (anything);
    `[shape]`, a list; `{"key": shape}`, an object with at least these keys, where "key?" may be missing;
    `{str: shape}`, an object with any keys; or a tuple of shapes, one of which must fit.
    """
    match shape:
        case tuple():
            problems = [misfit(value, one, place) for one in shape]
            return "" if "" in problems else problems[0]
        case list():
            if not isinstance(value, list):
                return f"{place} is not a list"
            inner = ((one, shape[0], f"{place}.{number}") for number, one in enumerate(value))
        case dict():
            if not isinstance(value, dict):
                return f"{place} is not an object with keys and values"
            wanted = {name: shape[str] for name in value} if str in shape else {}
            for key, kind in shape.items():
                if key is str:
                    continue
                name = key.removesuffix("?")
                if name in value:
                    wanted[name] = kind
                elif name == key:
                    return f"{place} has no {key!r}"
            if problem := next(filter(None, (_misfit_scalar(name, str, "a key") for name in wanted)), ""):
                return problem
            inner = ((value[name], kind, f"{place}.{name}".removeprefix("it.")) for name, kind in wanted.items())
        case _:
            return _misfit_scalar(value, shape, place)
    return next(filter(None, (misfit(*one) for one in inner)), "")


def _misfit_scalar(value: Any, shape: Any, place: str) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null"}
    match value:
        case bool() | None:
            fits = shape is (None if value is None else bool)
        case int():
            fits = shape in (int, float) and abs(value) < 1 << 63
        case float():
            fits = shape is float
        case str():
            fits = shape is str and not re.search("[\ud800-\udfff]", value)
        case _:
            fits = False
    return "" if fits or shape is object else f"{place} is not {names[shape]}"


def sha256_file(path: Path) -> str:
    """Return the hex digest of a file's content, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(*parts: str) -> str:
    """Return the hex digest of several strings. Different splits of the same text give different digests."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()


def lock_folder(folder: Path, patience_s: float = 0.0) -> IO[bytes] | None:
    """Lock a folder until the returned file is closed or this process ends. Return None if another process holds the
    lock for `patience_s` seconds more. Makes the folder. A file system without locks locks nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe in its place does not block
    file = os.fdopen(os.open(folder / ".lock", flags, 0o666), "rb")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                return None
            time.sleep(0.2)
        except OSError:
            return file  # a file system without locks
        else:
            return file


@contextmanager
def new_directory(path: Path, exclusive: bool = False) -> Iterator[Path]:
    """Yield a scratch directory that becomes `path` if the block succeeds and is removed if it fails.

    Two processes may race to make the same directory. The first rename wins and the work of the second process is
    dropped, so equal names must mean equal content, as with a content hash. `exclusive` allows any content: if another
    process has made `path` meanwhile, it stays, and a `ConfigError` names the directory with the finished work.
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
                reason = f"appeared while it was being made, and was not replaced; the finished work is in {kept}"
                raise ConfigError("out", str(path), reason) from None
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
