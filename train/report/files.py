"""Read a run's files for its report. Damaged parts are left out, and a sentence names each."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from core.files import misfit, read_json
from train.exam.results import StepScore, scores_by_step
from train.report.ledger import LINE
from train.run_directory import (
    EVALUATIONS,
    EXAMPLES,
    EXAMPLES_FOLDER,
    EXAMPLES_SHAPE,
    PREDICTION,
    parse_lines,
    read_prediction,
)

LARGEST = 1e100
"""Larger numbers are damage: no metric has them, and no axis can show them."""
LARGEST_PICTURE = 1 << 20
"""Bytes of a picture in the folder of examples. Larger ones are not by Leviathan."""
_PICTURE_NAME, _PNG = re.compile(r"[0-9a-f]{16}\.png"), b"\x89PNG"
_LINE_NUMBERS = ("learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_bytes")
_LOAD_NUMBERS = ("max_over_mean", "entropy", "dead")
_LAYER_LISTS = ("router_entropy", "router_z", "expert_overlap")
_RATES = ("documents", "own", "other", "none")
_SUMMARY_NUMBERS = (
    "steps",
    "heldout_loss",
    "unigram_loss",
    "bigram_loss",
    "tokens_per_second",
    "peak_memory_bytes",
    "total_parameters",
    "active_parameters",
    "world_size",
)


def is_number(value: Any) -> bool:
    """Return whether a value from JSON is a finite number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_score(score: StepScore) -> bool:
    """Return whether a score and its interval can be drawn, or a reason stands in their place. Comparisons with NaN are
    false.
    """
    if not score.is_known:
        return bool(score.not_asked)
    numbers = is_number(score.score) and is_number(score.low) and is_number(score.high)
    in_range = numbers and 0 <= score.low <= score.high <= 1 and 0 <= score.score <= 1
    in_range = in_range and (score.clean is None or (is_number(score.clean) and 0 <= score.clean <= 1))
    return in_range and (score.step is None or score.step >= 0)


class RunFiles:
    """Reads files in a run's directory. `problems`: by file, a sentence about each that is damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.problems: dict[str, str] = {}

    def log(self) -> list[str]:
        """Return the lines of log.txt."""
        return self._read("log.txt", _text, "").splitlines()

    def metrics(self, layers: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the logged steps and the evaluations in metrics.jsonl, by step, the last one of each step.

        `layers`: number of MoE layers.
        """
        text = self._read("metrics.jsonl", _text, "")
        lines = list(parse_lines(text))
        if lines and lines[-1] is None and not text.endswith("\n"):
            lines.pop()  # the run is writing it
        steps, evaluations, damaged = {}, {}, 0
        for line in lines:
            if line is None or not _is_sound(line, layers):
                damaged += 1
            elif "loss" in line:
                steps[line["step"]] = line
            elif "heldout_loss" in line:
                evaluations[line["step"]] = line
        if damaged:
            verb = "is" if damaged == 1 else "are"
            self.problems["metrics.jsonl"] = f"{damaged:,} of {len(lines):,} lines {verb} damaged and left out"
        return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)]

    def ledger(self) -> list[dict[str, Any]]:
        """Return the lines of recovery.jsonl."""
        text = self._read("recovery.jsonl", _text, "")
        lines = list(parse_lines(text))
        if lines and lines[-1] is None and not text.endswith("\n"):
            lines.pop()  # the run is writing it
        if damaged := sum(line is None or bool(misfit(line, LINE)) for line in lines):
            verb = "is" if damaged == 1 else "are"
            self.problems["recovery.jsonl"] = f"{damaged:,} of {len(lines):,} lines {verb} damaged and left out"
        return [line for line in lines if line is not None]

    def summary(self) -> dict[str, Any]:
        """Return summary.json, empty for a run that has not ended."""
        found = self._read("summary.json", read_json, {})
        if not isinstance(found, dict):
            self.problems["summary.json"] = "holds no keys and is left out"
            return {}
        wrong = [key for key in _SUMMARY_NUMBERS if found.get(key) is not None and not is_number(found[key])]
        if not _is_held_out(found.get("heldout")):
            wrong.append("heldout")
        if wrong:
            self.problems["summary.json"] = f"damaged values are left out: {', '.join(wrong)}"
        return {key: value for key, value in found.items() if key not in wrong}

    def examinations(self) -> dict[str, list[StepScore]]:
        """Return the scores of each examination, in the order in which it was asked."""
        found: dict[str, list[StepScore]] = self._read(EVALUATIONS, scores_by_step, {})
        sound = {label: [one for one in scores if is_score(one)] for label, scores in found.items()}
        if sound != found:
            self.problems[EVALUATIONS] = "scores that are no numbers from 0 to 1 are left out"
        return {label: scores for label, scores in sound.items() if scores}

    def prediction(self) -> dict[str, float]:
        """Return the planner's prediction of speed and memory, empty if there is none."""
        found = read_prediction(self.directory / PREDICTION) or {}
        return {key: value for key, value in found.items() if is_number(value)}

    def examples(self) -> list[dict[str, Any]]:
        """Return the held-out documents with pictures that the run keeps, with `pngs`, the contents of the pictures."""
        name, lost = f"{EXAMPLES_FOLDER}/{EXAMPLES}", 0
        found = self._read(name, lambda path: read_json(path, EXAMPLES_SHAPE)["examples"], [])
        for one in found:
            one["pngs"] = [png for picture in one["pictures"] if (png := self._picture(picture)) is not None]
            lost += len(one["pictures"]) - len(one["pngs"])
        if lost:
            self.problems[name] = f"pictures are missing or damaged: {lost}"
        return found

    def _picture(self, name: str) -> bytes | None:
        path = self.directory / EXAMPLES_FOLDER / name
        try:
            if not _PICTURE_NAME.fullmatch(name) or path.is_symlink() or path.stat().st_size > LARGEST_PICTURE:
                return None
            content = path.read_bytes() if path.is_file() else b""
        except OSError:
            return None
        return content if content.startswith(_PNG) else None

    def _read(self, name: str, read: Callable[[Path], Any], missing: Any) -> Any:
        path = self.directory / name
        try:
            return read(path) if path.exists() else missing
        except OSError as error:
            self.problems[name] = f"cannot be read ({error.strerror}) and is left out"
        except ValueError as error:
            reason = " ".join(str(error).removeprefix(f"{path}: ").split())
            self.problems[name] = f"cannot be read ({reason}) and is left out"
        return missing


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError("is not a file")  # opening a named pipe would wait for a writer
    return path.read_text(errors="replace")


def _is_sound(line: dict[str, Any], layers: int) -> bool:
    """Return whether a line of metrics.jsonl has values of the kinds that the report shows."""
    if "loss" not in line and "heldout_loss" not in line:
        return True  # of no interest here
    if not isinstance(line.get("step"), int) or not is_number(line["step"]) or line["step"] < 1:
        return False
    if "loss" not in line:
        losses, answers = [line.get("heldout", {}), line.get("heldout_by_modality", {})], line.get("answers", {})
        if not _are_numbers(line.get("retrieval", {})):
            return False
        return is_number(line["heldout_loss"]) and all(map(_are_sources, losses)) and _are_answers(answers)
    if not (is_number(line["loss"]) and is_number(line.get("tokens"))):
        return False
    if any(line.get(key) is not None and not is_number(line[key]) for key in _LINE_NUMBERS):
        return False
    apart = [line.get(key, {}) for key in ("loss_by_modality", "expert_load_by_modality")]
    if not all(isinstance(one, dict) for one in apart) or not all(map(is_number, apart[0].values())):
        return False
    if "expert_load" not in line:
        return True
    loads, lists = [line["expert_load"], *apart[1].values()], [line[key] for key in _LAYER_LISTS if key in line]
    if any(not isinstance(one, list) or len(one) != layers for one in (*loads, *lists)):
        return False
    return all(map(_is_load, chain(*loads))) and all(map(is_number, chain(*lists)))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(map(is_number, values.values()))


def _is_load(load: Any) -> bool:
    return isinstance(load, dict) and all(is_number(load.get(key)) for key in _LOAD_NUMBERS)


def _is_held_out(result: Any) -> bool:
    """Return whether a summary's `heldout` is None or has values of the right kinds."""
    if result is None:
        return True
    if not isinstance(result, dict) or not _are_sources(result.get("sources", {})):
        return False
    return result.get("bits_per_byte") is None or is_number(result["bits_per_byte"])


def _are_answers(found: Any) -> bool:
    """Return whether `found` has the fractions of right answers for each source."""
    if not isinstance(found, dict):
        return False
    return all(isinstance(one, dict) and all(is_number(one.get(key)) for key in _RATES) for one in found.values())


def _are_sources(found: Any) -> bool:
    """Return whether `found` has a dict for each source, whose loss, if there is one, is a number."""
    if not isinstance(found, dict):
        return False
    return all(isinstance(one, dict) and ("loss" not in one or is_number(one["loss"])) for one in found.values())
