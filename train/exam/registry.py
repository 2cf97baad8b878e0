"""The kinds of examinations that a suite can name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from core.config import build
from core.errors import ConfigError
from core.import_path import construct
from train.exam.base import Exam
from train.exam.config import ExamConfig, SuiteConfig

EXAMS = {
    "linear_systems": "train.exam.mathematics:LinearSystems",
    "quadratics": "train.exam.mathematics:Quadratics",
    "word_problems": "train.exam.mathematics:WordProblems",
    "multiple_choice": "train.exam.knowledge:MultipleChoice",
    "short_lists": "train.exam.knowledge:ShortLists",
    "fact_lists": "train.exam.knowledge:FactLists",
    "fact_choices": "train.exam.knowledge:FactChoices",
    "scenes": "train.exam.pictures:SceneQuestions",
    "programs": "train.exam.code.programs:Programs",
    "pages": "train.exam.code.pages:Pages",
}
"""Kind -> module and dataclass. Its fields are the options."""
_NEEDED = ("name", "version", "questions", "judge")


def make_suite(config: SuiteConfig) -> dict[str, Exam]:
    """Return the examinations of a suite by their labels. Raises `ConfigError` as `make_exam` does, and for a suite
    without any.
    """
    if not config.exams:
        reason = "has no examination: add +suite.exams.NAME={exam: KIND, options: {...}}"
        raise ConfigError("suite", config.name, reason)
    exams = {}
    for label, one in config.exams.items():
        try:
            exams[label] = make_exam(one)
        except ConfigError as error:
            raise error.under(f"suite.exams.{label}") from None
    return exams


def make_exam(config: ExamConfig) -> Exam:
    """Make an examination and its questions. Raises `ConfigError` for an unknown kind, for options that it does not
    have, and for questions that cannot be read or have the same id.
    """
    kind, options = config.exam, config.options
    if kind in EXAMS:
        module, _, name = EXAMS[kind].partition(":")
        exam = _built(getattr(import_module(module), name), options)
    elif ":" in kind:
        exam = construct(kind, "exam", options=options, needs=_NEEDED)
    else:
        raise ConfigError("exam", kind, "no such examination", list(EXAMS))
    try:
        ids = [question.id for question in exam.questions()]
    except ConfigError as error:
        raise error.under("options") from None
    if not ids:
        raise ConfigError("exam", kind, "asks nothing")
    if len(set(ids)) < len(ids):
        repeated = next(one for one in ids if ids.count(one) > 1)
        raise ConfigError("exam", kind, f"two of its questions have the id {repeated!r}")
    return exam


def _built(kind: Any, options: Mapping[str, Any]) -> Exam:
    try:
        return build(kind, dict(options))
    except ConfigError as error:
        raise error.under("options") from None
