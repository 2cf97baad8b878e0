"""Ways to damage a file, and the judgement of how a command ended that met one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

Damage = Callable[[Path], object]


def cleared(path: Path) -> Path:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path


def content(value: bytes) -> Damage:
    return lambda path: cleared(path).write_bytes(value)


def halved(path: Path) -> None:
    whole = path.read_bytes() if path.is_file() else b""
    cleared(path).write_bytes(whole[: len(whole) // 2])


DAMAGES: dict[str, Damage] = {
    "missing": cleared,
    "empty": content(b""),
    "truncated": halved,
    "binary": content(bytes(range(256)) * 40),
    "zeros": content(b"\0" * 5000),
    "folder": lambda path: cleared(path).mkdir(),
    "pipe": lambda path: os.mkfifo(cleared(path)),
    "dangling link": lambda path: cleared(path).symlink_to("nowhere"),
    "link to itself": lambda path: cleared(path).symlink_to(path.name),
    "null": content(b"null"),
    "number": content(b"7"),
    "text": content(b'"text"'),
    "list": content(b"[]"),
    "list of lists": content(b"[[1, 2], [3]]"),
    "no keys": content(b"{}"),
    "odd keys": content(b'{"step": "x", "": null, "a": {"b": [1e999, NaN, -1e400]}}'),
    "depth": content(b"[" * 100_000),
    "depth of keys": content(b'{"a":' * 5_000 + b"1" + b"}" * 5_000),
    "utf-16": content('{"text": "é"}'.encode("utf-16")),
    "long number": content(b"1" * 5_000),
    "surrogate": content(b'{"text": "\\ud800", "step": 1}'),
}
"""What is done to a file, by name."""


def fault(done: subprocess.CompletedProcess[str]) -> str:
    """Return what is wrong with the end of a command, or an empty text."""
    shown = done.stderr[-600:] + done.stdout[-200:]
    if "Traceback" in shown or "internal error" in shown:
        return f"ends in a traceback: {shown}"
    if done.returncode not in (0, 1, 2, 130):
        return f"ends with {done.returncode}: {shown}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("leviathan: error: ")]
    if bool(errors) != bool(done.returncode) or len(errors) > 1 or len(done.stderr.splitlines()) > 3:
        return f"ends with {done.returncode} and {len(errors)} error lines: {shown}"
    return ""


def hostile_json(path: Path, value: object) -> None:
    cleared(path).write_text(json.dumps(value))


def wrong(outcomes: Iterable[tuple[object, str]]) -> list[str]:
    """Return the cases, each with what is wrong with its end, in which something is."""
    return [f"{case} {why}" for case, why in outcomes if why]
