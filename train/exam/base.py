"""The contract of an examination: it asks questions, a model answers with text, and a judge says what each is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from core.files import sha256_text


@dataclass(frozen=True)
class Question:
    """`prompt`: the text that the model continues; each `<image>` in it stands for the next of the encoded `pictures`.
    The answer ends before the first of `stops`, or after `max_tokens` tokens, or where the model's context ends: a
    `CutAnswer`. `reference`: what the judge needs.
    `own_text`: the prompt without instructions and solved examples, which is looked for in training corpora; None: the
    whole prompt. It is no part of the fingerprint.
    """

    id: str
    prompt: str
    reference: Any = None
    pictures: tuple[bytes, ...] = ()
    max_tokens: int = 64
    stops: tuple[str, ...] = ("\n\n",)
    own_text: str | None = field(default=None, repr=False)


class Outcome(Enum):
    """What became of an answer."""

    right = "right"
    partly = "partly"
    """Some of what was asked for: the score lies between 0 and 1."""
    wrong = "wrong"
    unreadable = "unreadable"
    """Nothing in it could be read as an answer. Scores 0."""
    judge_failed = "judge_failed"
    """The judge crashed: no fault of the model. Counted apart, without a score."""
    not_asked = "not_asked"
    """The model cannot be asked: `NotAsked`. Counted apart, without a score."""

    @property
    def is_scored(self) -> bool:
        return self not in (Outcome.judge_failed, Outcome.not_asked)


@dataclass(frozen=True)
class NotAsked:
    """Why a question could not be asked of a model: it does not fit its context, the model cannot read pictures, or the
    question is broken.
    """

    reason: str


class CutAnswer(str):
    """The text of an answer that ended because the model's context did."""


@dataclass(frozen=True)
class Verdict:
    """`score`: from 0 to 1. `note`: one line, why. `figures`: further finite numbers, averaged over the
    questions.
    """

    outcome: Outcome
    score: float
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"a score must lie in [0, 1], not {self.score}")
        if not all(math.isfinite(value) for value in self.figures.values()):
            raise ValueError(f"figures must be finite numbers, not {dict(self.figures)}")
        if (self.outcome is Outcome.right) != (self.score == 1):
            raise ValueError(f"an answer is right if and only if it scores 1: {self.outcome.name}, {self.score}")


class Exam(Protocol):
    """An examination. `version` changes with everything that may change a score, but for the questions' content."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def questions(self) -> Sequence[Question]:
        """Return the same questions each time. Ids are unique."""
        ...

    def judge(self, question: Question, answer: str) -> Verdict:
        """Judge an answer. An exception counts as `judge_failed`."""
        ...


@runtime_checkable
class MachineExam(Protocol):
    """An examination that runs answers with programs of the machine."""

    @property
    def limits(self) -> Any:
        """What an answer may use: a dataclass. A part of the fingerprint."""
        ...

    def machine(self) -> Mapping[str, str]:
        """Return the versions of the programs that run the answers. They are a part of the result only."""
        ...


def fingerprint(exam: Exam) -> str:
    """Hash everything that an examination asks, and the limits of what it runs. Scores can be compared only if it is
    equal.
    """
    limits = [repr(exam.limits)] if isinstance(exam, MachineExam) else []
    parts = (exam.name, str(exam.version), *limits)
    return sha256_text(*parts, *(repr(question) for question in exam.questions()))
