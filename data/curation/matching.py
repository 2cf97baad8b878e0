"""Match captions against metadata as MetaCLIP does (Xu et al. 2023, arXiv 2309.16671, section 3.2).

A caption matches an entry if " entry " occurs in the caption, after `spaced` has put spaces around it and around its
punctuation. Upper and lower case differ. Aho-Corasick finds all entries in one pass over the caption.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from core.errors import ConfigError, UnreadableFileError
from core.files import read_text, sha256_text

_PUNCTUATION = ",.;:?!`"
_SPACED = str.maketrans({**{mark: f" {mark} " for mark in _PUNCTUATION}, **dict.fromkeys("\t\n\r", " ")})
_NEVER = re.compile(rf"[\t\n\r]|(?<! )[{_PUNCTUATION}]|[{_PUNCTUATION}](?! )")
"""What " entry " has in it if no spaced caption contains it."""


def spaced(text: str) -> str:
    """Put spaces around a text and around each of its marks , . ; : ? ! `, and turn tabs and line ends into spaces."""
    return f" {text} ".translate(_SPACED)


@dataclass(frozen=True)
class Metadata:
    """Entries, each once, in the order of the file. `repeated`: lines of the file that repeat an entry."""

    entries: tuple[str, ...]
    repeated: int = 0

    @property
    def fingerprint(self) -> str:
        return sha256_text(*self.entries)

    @cached_property
    def impossible(self) -> list[str]:
        """The entries that no caption can match, because `spaced` would divide them: "3.5" is "3 . 5" in a caption."""
        return [entry for entry in self.entries if _NEVER.search(f" {entry} ")]


def read_metadata(path: Path) -> Metadata:
    """Read a text file with an entry on each line. Spaces around an entry and blank lines are ignored.

    Raises `ConfigError` (key `metadata`) for a file that cannot be read or has no entry.
    """
    try:
        lines = [line.strip() for line in read_text(path).removeprefix("\ufeff").split("\n")]
    except (OSError, UnreadableFileError) as error:
        reason = str(error.strerror) if isinstance(error, OSError) and error.strerror else "is not a UTF-8 text file"
        raise ConfigError("metadata", str(path), f"cannot be read: {reason}") from None
    found = [line for line in lines if line]
    if not found:
        raise ConfigError("metadata", str(path), "has no entry; write one on each line")
    entries = tuple(dict.fromkeys(found))
    return Metadata(entries, len(found) - len(entries))


class EntryMatcher:
    """Finds the entries that a caption matches. Raises `ConfigError` if the package ahocorasick-rs is missing."""

    def __init__(self, entries: tuple[str, ...]) -> None:
        try:
            from ahocorasick_rs import AhoCorasick
        except ImportError:
            reason = "matching needs ahocorasick-rs: pip install 'leviathan[curation]'"
            raise ConfigError("metadata", None, reason) from None
        self._automaton: Any = AhoCorasick([f" {entry} " for entry in entries], store_patterns=False)

    def match(self, caption: str) -> list[int]:
        """Return the sorted numbers of the entries that the caption matches."""
        # overlapping: neighbours share the space between them
        found = self._automaton.find_matches_as_indexes(spaced(caption), overlapping=True)
        return sorted({number for number, _, _ in found})
