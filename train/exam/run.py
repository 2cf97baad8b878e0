"""Ask a model the questions of examinations, judge its answers, and keep the results.

A model is a function from questions to answers, so that any kind of model can be asked.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

from core.config import plain
from core.errors import LeviathanError, one_line
from core.package_guard import sources_digest
from train.exam.base import CutAnswer, Exam, MachineExam, NotAsked, Outcome, Question, Verdict, fingerprint
from train.exam.config import SuiteConfig
from train.exam.registry import make_suite
from train.exam.statistics import interval

Ask = Callable[[Sequence[Question]], Sequence[str | NotAsked]]
"""Returns the answer of a model to each question, or why it could not be asked."""
LONGEST_ANSWER = 2000
"""Characters of an answer that are stored."""


@runtime_checkable
class ControlledExam(Protocol):
    """An examination that is asked in other ways too, to show what its score owes to something else."""

    def controls(self) -> Mapping[str, Exam]: ...


@dataclass(frozen=True)
class JudgedAnswer:
    """`is_cut`: whether the answer ended because the model's context did."""

    id: str
    answer: str
    verdict: Verdict
    is_cut: bool = False

    def plain(self) -> dict[str, Any]:
        """`score` is null if the judge failed or the question was not asked."""
        return {
            "id": self.id,
            "answer": self.answer[:LONGEST_ANSWER],
            "outcome": self.verdict.outcome.value,
            "score": self.verdict.score if self.verdict.outcome.is_scored else None,
            "note": self.verdict.note,
            "cut": self.is_cut,
        }


@dataclass(frozen=True)
class ExamResult:
    """`controls`: the results of the same questions asked in other ways. `machine`: the versions of the programs that
    ran the answers.
    """

    exam: str
    version: int
    fingerprint: str
    answers: tuple[JudgedAnswer, ...]
    controls: Mapping[str, ExamResult] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    @property
    def scores(self) -> list[float]:
        """The scores of the answers that could be judged."""
        return [one.verdict.score for one in self.answers if one.verdict.outcome.is_scored]

    @property
    def not_asked(self) -> str | None:
        """How many questions were not asked, and why, in one line."""
        reasons = [one.verdict.note for one in self.answers if one.verdict.outcome is Outcome.not_asked]
        if not reasons:
            return None
        which = "" if len(set(reasons)) == 1 else "the first: "
        return f"{len(reasons)} of {len(self.answers)} questions, {which}{reasons[0]}"

    @property
    def cut(self) -> str | None:
        """How many answers ended because the model's context did, in one line."""
        count = sum(one.is_cut for one in self.answers)
        return f"{count} of {len(self.answers)} answers end where the model's context does" if count else None

    def plain(self) -> dict[str, Any]:
        scores, found = self.scores, interval(self.scores)
        counts = Counter(one.verdict.outcome for one in self.answers)
        values: dict[str, list[float]] = {}
        for one in self.answers:
            for name, value in one.verdict.figures.items():
                values.setdefault(name, []).append(value)
        return {
            "exam": self.exam,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "machine": dict(self.machine),
            "questions": len(self.answers),
            "score": sum(scores) / len(scores) if scores else None,
            "interval": None if found is None else [found.low, found.high],
            "interval_method": None if found is None else found.method,
            "not_asked": self.not_asked,
            "cut": self.cut,
            "outcomes": {outcome.value: counts[outcome] for outcome in Outcome},
            "figures": {name: sum(some) / len(some) for name, some in values.items()},
            "controls": {name: _summary(one.plain()) for name, one in self.controls.items()},
            "answers": [one.plain() for one in self.answers],
        }


def run_exam(exam: Exam, ask: Ask) -> ExamResult:
    """Ask all questions of an examination and judge the answers; the same with its controls, if it has any."""
    questions = exam.questions()
    texts = ask(questions)
    if len(texts) != len(questions):
        raise LeviathanError(f"{exam.name}: {len(questions)} questions, but {len(texts)} answers")
    judged = tuple(
        JudgedAnswer(question.id, "", Verdict(Outcome.not_asked, 0, text.reason))
        if isinstance(text, NotAsked)
        else JudgedAnswer(question.id, text, _judged(exam, question, text), isinstance(text, CutAnswer))
        for question, text in zip(questions, texts, strict=True)
    )
    others = exam.controls() if isinstance(exam, ControlledExam) else {}
    controls = {name: run_exam(one, ask) for name, one in others.items()}
    machine = exam.machine() if isinstance(exam, MachineExam) else {}
    return ExamResult(exam.name, exam.version, fingerprint(exam), judged, controls, machine)


def run_suite(config: SuiteConfig, ask: Ask, exams: Mapping[str, Exam] | None = None) -> dict[str, Any]:
    """Return the line of `evaluations.jsonl` about a suite, without what it says about the model. `exams`: those of the
    suite, if they are made already.
    """
    exams = make_suite(config) if exams is None else exams
    results = {label: run_exam(exam, ask).plain() for label, exam in exams.items()}
    for label, one in results.items():
        one["options"] = plain(config.exams[label].options)
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "suite": config.name,
        "versions": {
            "leviathan": metadata.version("leviathan"),
            "code": sources_digest(),
            "torch": metadata.version("torch"),
            "python": platform.python_version(),
        },
        "exams": results,
    }


def nothing_asked(line: Mapping[str, Any]) -> str | None:
    """Return why no question of a suite was asked; None if some were."""
    if any(one["outcomes"]["not_asked"] < one["questions"] for one in line["exams"].values()):
        return None
    label, first = next(iter(line["exams"].items()))
    return f"{label}: {first['not_asked']}"


def summary(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of `evaluations.jsonl` without the single answers."""
    return {**line, "exams": {label: _summary(one) for label, one in line["exams"].items()}}


def _summary(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "answers"}


def _judged(exam: Exam, question: Question, answer: str) -> Verdict:
    try:
        return exam.judge(question, answer)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a judge raises, also SystemExit, is its own fault, not the model's
        return Verdict(Outcome.judge_failed, 0, one_line(error, 200))
