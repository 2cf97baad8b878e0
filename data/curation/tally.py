"""What becomes of the records of a file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from data.images.parts import BadRecord

_SHOWN = 20
"""Malformed records of a file that the audit quotes."""


class Fate(Enum):
    """What becomes of a record."""

    kept = "kept"
    balanced = "dropped to balance frequent entries"
    unmatched = "caption that matches no entry"
    empty = "no caption"
    huge = "caption above max_characters"
    no_picture = "no picture"
    malformed = "unreadable"


@dataclass
class FileTally:
    """What was found in one file. `digest`: of the pairs and their matches, to notice a file that changes."""

    name: str
    path: Path
    fates: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    damaged: bool = False
    digest: str = ""

    def add_malformed(self, record: BadRecord) -> None:
        if self.fates[Fate.malformed.name] < _SHOWN:
            self.problems.append(str(record))
        self.fates[Fate.malformed.name] += 1

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, "damaged": self.damaged, "fates": dict(self.fates), "problems": self.problems}
