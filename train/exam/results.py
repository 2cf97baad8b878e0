"""Find the stored results of suites, and compare them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError, UnreadableFileError
from core.files import misfit, read_json
from train.exam.base import Exam, fingerprint
from train.exam.statistics import RESULT_SHAPE, compare
from train.run_directory import EVALUATIONS, read_lines

_RESULT = {
    "fingerprint": str,
    "score": (float, None),
    "interval": ([float], None),
    "not_asked?": (str, None),
    "cut?": (str, None),
}
_SHOWN_SHAPE = {"suite": str, "step?": (int, None), "exams": {str: _RESULT}}
NOT_LOOKED_FOR, IN_PART = "not looked for", "searched in part"
"""Values of `contamination.status`."""
_CONTAMINATION_SHAPE = {
    "status": str,
    **dict.fromkeys(("found", "clean", "too_short"), int),
    **dict.fromkeys(("score_found", "score_clean"), (float, None)),
}
LINE_SHAPE = {"suite": str, "exams": {str: RESULT_SHAPE}}


def last_results(against: str, suite: str) -> dict[str, Any]:
    """Return the last line about a suite of a run's directory, or the content of a file that `out` wrote. Raises
    `ConfigError` (key `against`) if there is none.
    """
    path = Path(against).expanduser()
    try:
        if path.is_dir():
            lines = [line for line in read_lines(path / EVALUATIONS, LINE_SHAPE) if line["suite"] == suite]
        else:
            lines = [line for line in [read_json(path, LINE_SHAPE)] if line["suite"] == suite]
    except OSError as error:
        raise ConfigError("against", against, f"cannot be read: {error.strerror or error}") from None
    except UnreadableFileError as error:
        raise ConfigError("against", None, str(error)) from None
    if not lines:
        reason = f"has no results of the suite {suite}; make them: leviathan evaluate RUN suite={suite}"
        raise ConfigError("against", against, reason)
    return lines[-1]


@dataclass(frozen=True)
class StepScore:
    """A score with its 95% confidence interval, NaN if no question was asked. `not_asked`: why questions were not.
    `cut`: how many answers ended because the model's context did.
    `contamination`: what is known of the questions in the training corpus. `clean`: the score on those that are not in
    it, if others are.
    """

    step: int | None
    score: float
    low: float
    high: float
    contamination: str
    clean: float | None
    not_asked: str = ""
    cut: str = ""

    @property
    def is_known(self) -> bool:
        return not math.isnan(self.score)

    def __str__(self) -> str:
        found = [f"{self.score:.3f} ({self.low:.3f} to {self.high:.3f}{self.contamination})"] if self.is_known else []
        beside = [f"{name}: {said}" for name, said in (("not asked", self.not_asked), ("cut", self.cut)) if said]
        return "; ".join([*found, *beside])


def scores_of(line: Mapping[str, Any]) -> dict[str, StepScore]:
    """Return the score of each examination of a line, by suite and label."""
    found = {}
    for name, one in line["exams"].items():
        is_known = one["score"] is not None and one["interval"] is not None and len(one["interval"]) == 2
        not_asked = one.get("not_asked") or ""
        if is_known or not_asked:
            score, low, high = (one["score"], *one["interval"]) if is_known else (math.nan,) * 3
            beside = _beside(one.get("contamination"))
            found[f"{line['suite']}/{name}"] = StepScore(
                line.get("step"), score, low, high, *beside, not_asked, one.get("cut") or ""
            )
    return found


def _beside(contamination: Any) -> tuple[str, float | None]:
    """Say how many questions are in the training corpus, and the scores on these and on the others. Return the last
    score too.
    """
    if not misfit(contamination, {"status": str}) and contamination["status"] == NOT_LOOKED_FOR:
        return "; questions not looked for in training text", None
    if misfit(contamination, _CONTAMINATION_SHAPE):
        return "", None
    found, short = contamination["found"], contamination["too_short"]
    where = "the part of the training text that was searched" if contamination["status"] == IN_PART else "training text"
    parts = [f"; {found} of {found + contamination['clean'] + short} questions in {where}"]
    parts += [f"{short} too short to be found"] * bool(short)
    for key, name in (("score_found", "score on these"), ("score_clean", "on the others")):
        if found and contamination[key] is not None:
            parts.append(f"{name} {contamination[key]:.3f}")
    return ", ".join(parts), contamination["score_clean"] if found else None


def asked_before(path: Path, step: int, suite: str, fingerprints: Mapping[str, str]) -> bool:
    """Return whether a file of results has those of a suite at a step, to the same questions."""
    lines = read_lines(path, _SHOWN_SHAPE)
    found = (line for line in lines if line.get("step") == step and line["suite"] == suite)
    return any({name: one["fingerprint"] for name, one in line["exams"].items()} == fingerprints for line in found)


def scores_by_step(path: Path) -> dict[str, list[StepScore]]:
    """Return all scores of each examination in a file of results. The labels have the beginning of the fingerprint:
    scores under one label can be compared.
    """
    found: dict[str, list[StepScore]] = {}
    for line in read_lines(path, _SHOWN_SHAPE):
        for name, score in scores_of(line).items():
            fingerprint = line["exams"][name.removeprefix(f"{line['suite']}/")]["fingerprint"]
            found.setdefault(f"{name} ({fingerprint[:8]})", []).append(score)
    return found


def check_comparable(other: Mapping[str, Any], exams: Mapping[str, Exam]) -> None:
    """Raise `ConfigError` (key `against`) unless results are of the questions of these examinations, as
    `compare_suites` does, but before they are asked.
    """
    asked = {
        label: {
            "fingerprint": fingerprint(exam),
            "answers": [{"id": question.id, "score": None} for question in exam.questions()],
        }
        for label, exam in exams.items()
    }
    compare_suites(other, {"exams": asked})


def compare_suites(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the results of each examination of a suite: `train.exam.statistics.compare`. Raises `ConfigError` (key
    `against`) for results of different questions.
    """
    if first["exams"].keys() != second["exams"].keys():
        both = [", ".join(one["exams"]) or "none" for one in (first, second)]
        raise ConfigError("against", None, f"has other examinations ({both[0]}) than this suite ({both[1]})")
    found = {}
    for label, result in second["exams"].items():
        try:
            found[label] = compare(first["exams"][label], result)
        except ConfigError as error:
            raise ConfigError("against", None, f"{label}: {error.reason}") from None
    return found
