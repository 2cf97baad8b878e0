"""A record of the filter: one document, or one prompt with its response."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from core.files import sha256_text


@dataclass(frozen=True)
class Record:
    id: str
    domain: str
    source: str
    """File and line or row: "notes.jsonl:12"."""
    text: str
    answer_start: int | None = None
    """Where the response begins in `text`, in characters; None for a plain document."""
    raw: str | None = None
    """The input's record as a line of JSON, for `kept.jsonl`; None: {"text": ...}."""

    @property
    def prompt(self) -> str:
        """The text before the response, empty for a plain document."""
        return self.text[: self.answer_start or 0]

    @property
    def answer(self) -> str:
        """The response, or a whole plain document."""
        return self.text[self.answer_start or 0 :]

    @property
    def content(self) -> str:
        """The hash of what a scorer may depend on."""
        return sha256_text(self.text, str(self.answer_start))


class Reason(Enum):
    """Why a record is kept or dropped. Each record has exactly one, so counts add up to the input's."""

    hard = "hard"
    """Kept for its score."""
    revived = "revived"
    """Easy, but kept at random."""
    protected = "protected"
    """Kept regardless of its score: its domain's floor or protection, or `on_error=keep`."""
    easy = "easy"
    noise = "noise"
    """Harder than clean reference text."""
    unscored = "unscored"
    """The scorer gave no finite number and `on_error=drop`."""
    malformed = "malformed"
    empty = "empty"
    duplicate = "duplicate"
    near_duplicate = "near_duplicate"
    contaminated = "contaminated"
    non_text = "non_text"
    repetitive = "repetitive"
    scrambled = "scrambled"
    """Letters in random order."""
    language = "language"
    too_short = "too_short"
    too_long = "too_long"

    def describe(self, detail: str | None) -> str:
        """Name the reason with its detail: the record it copies, the evaluation set, the reading error."""
        joint = {"duplicate": " of ", "near_duplicate": " of ", "contaminated": " by "}.get(self.name, ": ")
        return self.name if detail is None else f"{self.name}{joint}{detail}"

    @property
    def kept(self) -> bool:
        return self in (Reason.hard, Reason.revived, Reason.protected)
