"""One document, or one prompt with its response, as every stage of the filter sees it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from core.files import sha256_text


@dataclass(frozen=True)
class Record:
    """`answer_start`: where the response begins in `text`, in characters; null for a plain document. `raw`: the input's
    own record as a line of JSON, which `kept.jsonl` repeats; null: {"text": ...} serves.
    """

    id: str
    domain: str
    source: str
    """File and place, for people: "notes.jsonl:12"."""
    text: str
    answer_start: int | None = None
    raw: str | None = None

    @property
    def prompt(self) -> str:
        """What comes before the response; nothing for a plain document."""
        return self.text[: self.answer_start or 0]

    @property
    def answer(self) -> str:
        """The response, or the whole of a plain document."""
        return self.text[self.answer_start or 0 :]

    @property
    def content(self) -> str:
        """A hash of what a scorer may depend on."""
        return sha256_text(self.text, str(self.answer_start))


class Reason(Enum):
    """Why a record is kept or dropped, with the text that people read. Each record has exactly one reason."""

    hard = "kept for its score"
    revived = "below the threshold, kept at random"
    protected = "kept regardless of its score"
    easy = "score below the threshold"
    noise = "score above that of clean text"
    unscored = "no finite score"
    malformed = "unreadable"
    empty = "no text"
    duplicate = "copy of another record"
    near_duplicate = "near copy of another record"
    contaminated = "overlaps an evaluation set"
    non_text = "not text"
    repetitive = "repeats itself"
    scrambled = "letters in random order"
    language = "other language"
    too_short = "too short"
    too_long = "too long"

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    def describe(self, detail: str | None) -> str:
        """The name with its detail: the original of a copy, the evaluation set, or the parse error."""
        joint = {Reason.duplicate: " of ", Reason.near_duplicate: " of ", Reason.contaminated: " by "}.get(self, ": ")
        return self.name if detail is None else f"{self.name}{joint}{detail}"

    @property
    def kept(self) -> bool:
        return self in (Reason.hard, Reason.revived, Reason.protected)
