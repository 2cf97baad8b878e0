"""Find the stored results of suites, and compare them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError, UnreadableFileError
from core.files import read_json
from train.exam.statistics import RESULT_SHAPE, compare
from train.run_directory import read_lines

EVALUATIONS = "evaluations.jsonl"
"""File in a run's directory with a line per evaluated suite."""
_RESULT = {"fingerprint": str, "score": (float, None), "interval": ([float], None), "not_asked?": (str, None)}
_SHOWN_SHAPE = {"suite": str, "exams": {str: _RESULT}}
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


def last_scores(path: Path) -> dict[str, str]:
    """Return the last score of each examination in a file of results, with its confidence interval, as text, and why
    questions were not asked. The labels have the beginning of the fingerprint: scores under one label can be compared.
    """
    found = {}
    for line in read_lines(path, _SHOWN_SHAPE):
        for name, one in line["exams"].items():
            label = f"{line['suite']}/{name} ({one['fingerprint'][:8]})"
            if one["score"] is not None and one["interval"] is not None and len(one["interval"]) == 2:
                low, high = one["interval"]
                found[label] = f"{one['score']:.3f} ({low:.3f} to {high:.3f})"
                if one.get("not_asked"):
                    found[label] += f"; not asked: {one['not_asked']}"
            elif one.get("not_asked"):
                found[label] = f"not asked: {one['not_asked']}"
    return found


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
