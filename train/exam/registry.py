"""The kinds of examinations that a suite can name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from core.config import build, config_directory, groups
from core.errors import ConfigError, UnreadableFileError
from core.import_path import construct
from core.yaml_file import read_yaml
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


def read_suites(names: Sequence[str]) -> dict[str, SuiteConfig]:
    """Return suites by their own names. Each of `names` is a preset or the path of a YAML file of the same content.

    Raises `ConfigError` (key `suites`) for one that cannot be read or asks nothing, and if two have the same name.
    """
    found: dict[str, SuiteConfig] = {}
    for name in names:
        presets = [preset for preset in groups()["suite"] if preset != "own"]
        path = config_directory() / "suite" / f"{name}.yaml" if name in presets else Path(name).expanduser()
        if name not in presets and path.suffix != ".yaml":
            raise ConfigError("suites", name, "no such suite; a file must end in .yaml", presets)
        try:
            values = read_yaml(path)
            suite = build(SuiteConfig, {"name": path.stem, **values} if isinstance(values, dict) else values)
        except (OSError, UnreadableFileError) as error:
            raise ConfigError("suites", name, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
        except ConfigError as error:
            raise ConfigError("suites", name, str(error)) from None
        if not suite.exams:
            raise ConfigError("suites", name, "has no examination (exams)")
        if suite.name in found:
            raise ConfigError("suites", name, f"two suites are called {suite.name} (the key name); rename one")
        found[suite.name] = suite
    return found


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
