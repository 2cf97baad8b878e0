"""Errors that a user sees as one line, with the fix and an exit code.

The exit codes of all commands are in `core/exit_codes.py`, and docs/exit_codes.md says when each verb returns them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from core.exit_codes import FAILED, INVALID

LONGEST_SHOWN, LONGEST_LINE = 200, 3000
"""Characters of a value, and of a whole message, that are shown."""


class LeviathanError(Exception):
    """An expected failure, printed as one line without a traceback."""

    exit_code = FAILED
    everywhere = False
    """Whether all ranks raise the same error. If so, only rank 0 prints it."""


class OneLineError(Exception):
    """An error whose message is one printable line, whatever it quotes from a file."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Return `text` in one line. Characters that a terminal may obey are escaped, and a very long text is cut."""
    line = " ".join(text.split())
    if not line.isprintable():
        line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, for people: "1 record", "1,200 records"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class DataError(OneLineError, LeviathanError):
    """Stored data is missing, truncated or differs from its manifest."""


class UnreadableFileError(DataError, ValueError):
    """A file is not a regular file, is too large, is not UTF-8, or does not parse."""


class CheckpointError(OneLineError, LeviathanError):
    """A checkpoint cannot be written, or no complete one can be read."""


class Diverged(LeviathanError):
    """The loss or gradient norm is NaN or infinite."""

    everywhere = True


class ConfigError(LeviathanError):
    """An invalid configuration, rejected before anything is built.

    `key` is relative to the component that raises the error. The code that builds the component prepends the path with
    `under`, so that the user reads the key as they would type it. `legal`: values that the message suggests.
    """

    exit_code = INVALID
    everywhere = True

    def __init__(self, key: str, value: object, reason: str, legal: Sequence[object] = ()) -> None:
        self.key, self.value, self.reason, self.legal = key, value, reason, tuple(legal)
        super().__init__(key, value, reason)

    def under(self, prefix: str) -> ConfigError:
        """Return the same error with `prefix.` before its key."""
        key = f"{prefix}.{self.key}" if self.key else prefix
        return type(self)(key, self.value, self.reason, self.legal)

    def __str__(self) -> str:
        advice = ""
        if self.legal:
            *most, last = map(_shown, self.legal)
            advice = f"; try {', '.join(most)} or {last}" if most else f"; try {last}"
        shown = "" if self.value is None else f"={_shown(self.value)}"
        if len(shown) > LONGEST_SHOWN:
            shown = f"{shown[:LONGEST_SHOWN]}..."
        name = f"{self.key}{shown}: " if self.key or shown else ""
        return printable(f"{name}{self.reason}{advice}")


def _shown(value: object) -> str:
    """Return a value as the user types it."""
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


class RenamedKeyError(ConfigError):
    """A key or value of an older version of the configuration."""


def check_numbers(config: object, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for the first listed field that is not finite or has the wrong sign. None is allowed."""
    for key in (*positive, *not_negative):
        value = getattr(config, key)
        if value is None:
            continue
        if not math.isfinite(value):
            raise ConfigError(key, value, "must be a finite number")
        if value < 0 or (key in positive and value == 0):
            raise ConfigError(key, value, "must be positive" if key in positive else "must not be negative")


def check_name(key: str, name: str) -> None:
    """Raise `ConfigError` unless `name` can be the name of one folder."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(key, name, "must be the name of one folder: not empty, without /, and not . or ..")
    if len(name.encode()) > 200:
        raise ConfigError(key, None, f"has {len(name.encode())} bytes; choose a name of at most 200")


def check_local(key: str, path: str) -> None:
    """Raise `ConfigError` for a URL where files must be on a file system of this machine."""
    if not path:
        raise ConfigError(key, path, "names no folder; try . for the current one")
    if "://" in path:
        raise ConfigError(key, path, "is a URL, but must be a folder on this machine or on a file system it mounts")


def one_line(error: BaseException, length: int | None = None) -> str:
    """Return the type of an error and its message (at most `length` characters) without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def divisors(number: int) -> list[int]:
    """Return every positive divisor of `number`, ascending."""
    low = [d for d in range(1, math.isqrt(min(number, 10**12)) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})
