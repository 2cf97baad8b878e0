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
    """Why a record is kept or not; each record has exactly one, so that counts add up to the input's."""

    hard = "hard"
    """Kept for its score."""
    revived = "revived"
    """Kept by lot, out of what is easy."""
    protected = "protected"
    """Kept whatever its score: its domain's floor or protection, or `on_error=keep`."""
    easy = "easy"
    noise = "noise"
    """Above the band: harder than clean reference text ever is."""
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
    """Letters in no order that text has."""
    language = "language"
    too_short = "too_short"
    too_long = "too_long"

    def told(self, detail: str | None) -> str:
        """With what is known besides: of which record it is a copy, from which set it is, why it cannot be read."""
        joint = {Reason.duplicate: " of ", Reason.near_duplicate: " of ", Reason.contaminated: " by "}.get(self, ": ")
        return self.name if detail is None else f"{self.name}{joint}{detail}"

    @property
    def kept(self) -> bool:
        return self in (Reason.hard, Reason.revived, Reason.protected)
