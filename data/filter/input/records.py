"""A record of the filter: one document, or one prompt with its response."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from core.files import sha256_text

LABEL, BAD_LABEL = "label", "bad_label"
"""Columns of `Record.label`, which is also the name of a scorer's own labels from its grader, and of `bad_label`."""


@dataclass(frozen=True)
class RecordPicture:
    """A picture of a record, or a frame of its video. `width` and `height` are in pixels; `tiles` and `tokens` stand
    for it in training. `hash` and `colours` are those of `data.images.phash`.
    """

    name: str
    """Its path, its column, or its member of a tar."""
    sha256: str
    size: int
    """Bytes as encoded."""
    width: int
    height: int
    tiles: int
    tokens: int
    hash: int
    colours: bytes
    thumbnail: bytes | None = None
    """A small JPEG, of the first pictures of a record."""


@dataclass(frozen=True)
class Record:
    id: str
    domain: str
    source: str
    """File or data set, and the line or row in it, such as "notes.jsonl:12"."""
    text: str
    answer_start: int | None = None
    """Where the response begins in `text`, in characters; None for a plain document."""
    raw: str | None = None
    """The input's line of JSON, which `kept.jsonl` repeats; None: `kept.jsonl` has {"text": ...} instead."""
    pictures: tuple[RecordPicture, ...] = ()
    label: float | None = None
    """Difficulty or quality by the input's own labels (`label_key`), on any scale; None: the record has none."""
    bad_label: str | None = None
    """What stands in place of a label and is not a number, as it would be written in Python."""

    @property
    def prompt(self) -> str:
        """The text before the response, empty for a plain document."""
        return self.text[: self.answer_start or 0]

    @property
    def answer(self) -> str:
        """The response, or the whole text of a plain document."""
        return self.text[self.answer_start or 0 :]

    @property
    def content(self) -> str:
        """A hash of everything on which a score may depend: the text, since scorers see no pictures."""
        return sha256_text(self.text, str(self.answer_start))


class Reason(Enum):
    """Why a record is kept or dropped, with a description for people. Each record has exactly one reason."""

    hard = "kept for its score"
    revived = "below the threshold, kept at random"
    protected = "kept regardless of its score"
    easy = "score below the threshold"
    noise = "score above that of clean text"
    unscored = "no finite score"
    malformed = "unreadable"
    empty = "no text"
    duplicate = "same text as another record"
    near_duplicate = "nearly the same text as another record"
    duplicate_pictures = "same pictures as other records"
    near_duplicate_pictures = "nearly the same pictures as other records"
    contaminated = "overlaps an evaluation set"
    non_text = "not text"
    repetitive = "repeats itself"
    scrambled = "letters in random order"
    language = "other language"
    too_short = "too short"
    too_long = "too long"

    def describe(self, detail: str | None) -> str:
        """Return the name with the detail: the original of a duplicate, the evaluation set, or the parse error."""
        joint = " of " if "duplicate" in self.name else " by " if self is Reason.contaminated else ": "
        return self.name if detail is None else f"{self.name}{joint}{detail}"

    @property
    def kept(self) -> bool:
        return self in (Reason.hard, Reason.revived, Reason.protected)
