"""The directory of a run: `config.yaml`, `metrics.jsonl`, `summary.json`, `checkpoints/`, `plots/` and `log.txt`.

A run resumes only under a configuration that does not change what is learnt, as this module checks.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from core.config import absolute, build, differences, plain
from core.errors import ConfigError, LeviathanError, RenamedKeyError, UnreadableFileError
from core.exit_codes import CRASHED
from core.files import TEXT_LIMIT, check_regular, locate, lock_folder, misfit, parse_json, read_json, write_text
from core.yaml_file import read_yaml
from train.config import TrainConfig, phases
from train.metap.hyperparameters import without_derived

MARKER = "COMMITTED"
"""Name of the file that is written last into a checkpoint's directory. A directory without it is not a checkpoint."""
DIVERGED = "diverged.json"
"""Name of the file that is written when a loss or a gradient norm is NaN or infinite."""
FREE = (
    "run.root",
    "run.name",
    "run.resume",
    "logging",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.asynchronous",
    "evaluation",
    "profile",
    "callbacks",
    "recovery",  # a run's amendments.json and its checkpoints say what recovery has changed
    "launch",
    "parallel",
    "precision.backend",
    "precision.recipe",
    "precision.fp8_products",
    "precision.bf16_first_layers",
    "precision.bf16_last_layers",
    "precision.kernels",
    "precision.attention",
    "training.deterministic",
    "training.micro_batch_size",
    "phases.*.micro_batch_size",
    "data.tokens",  # a checkpoint names the tokens that it was trained on by their hash
    "data.cache",
    "data.prefetch",
    "data.verify",
)
"""Keys that may change on resume. They affect what is learnt only through the rounding of matmuls."""


PREDICTION = "prediction.json"
"""File in a run's directory with the planner's prediction, where the GPU is known."""
EVALUATIONS = "evaluations.jsonl"
"""File in a run's directory with a line per evaluated suite."""
EXAMPLES_FOLDER, EXAMPLES = "examples", "examples.json"
"""The folder of held-out documents with pictures and the model's answers, and the file in it."""
EXAMPLES_SHAPE = {
    "step": int,
    "examples": [
        {
            "source": str,
            "question": str,
            "answer": str,
            "predicted": str,
            "is_right": bool,
            "pictures": [str],
            "more": int,
        }
    ],
}
"""`pictures`: names of files in the folder. `more`: the number of further pictures of the document."""


def read_prediction(path: Path) -> dict[str, float] | None:
    """Return the planner's prediction; None if there is none, or if it is damaged."""
    if not path.exists():
        return None
    try:
        found = read_json(path, {"tokens_per_second": float, "memory_bytes": float})
    except UnreadableFileError:
        return None
    return {key: found[key] for key in ("tokens_per_second", "memory_bytes")}


class RunLocked(LeviathanError):
    """The previous attempt still holds the lock. A later attempt may succeed."""

    exit_code = CRASHED


class RunDirectory:
    """The paths of a run's files. With `checkpoint.directory`, checkpoints are there, under the run's name."""

    def __init__(self, path: Path, elsewhere: str | None = None) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints" if elsewhere is None else locate(elsewhere) / path.name
        self.metrics = path / "metrics.jsonl"
        self.online = path / "online.jsonl"
        self.ledger = path / "recovery.jsonl"
        self.amendments = path / "amendments.json"
        self.evaluations = path / EVALUATIONS
        self.summary = path / "summary.json"
        self.config_file = path / "config.yaml"
        self.logs = path / "logs"
        self.environment = path / "environment.json"
        self.prediction = path / PREDICTION
        self.tokenizer = path / "tokenizer"
        self.examples = path / EXAMPLES_FOLDER
        self._lock: IO[bytes] | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> RunDirectory:
        name = config.run.name or time.strftime("%Y%m%d-%H%M%S")
        return cls(Path(config.run.root).expanduser() / name, config.checkpoint.directory)

    def check(self, config: TrainConfig) -> None:
        """Raise `ConfigError` if the directory holds a run that must not resume under `config`."""
        if not self.config_file.exists():
            return
        if not config.run.resume:
            raise ConfigError("run.name", config.run.name, f"{self.path} holds a run already; choose another name")
        before = RunDirectory(self.path, load_config(self.path).checkpoint.directory)
        if committed(before.checkpoints):  # without one nothing was learnt, and any key may change
            before._check_same(config)

    def open(self, config: TrainConfig) -> None:
        """Make the directory and store the configuration."""
        self._try_writing(config.checkpoint.directory)
        self.path.mkdir(parents=True, exist_ok=True)
        named = replace(config, run=replace(config.run, name=self.path.name))
        write_config(self.config_file, named)

    def lock(self, patience_s: float = 0.0) -> None:
        """Lock the directory until `release` or the end of this process. Wait up to `patience_s` seconds for the lock.

        One process of a run calls this. Without the lock, two runs under one name would overwrite each other's files.
        """
        self._lock = lock_folder(self.path, patience_s)
        if self._lock is not None:
            return
        reason = f"another process is training in {self.path}; wait for it, stop it, or choose another name"
        if patience_s:
            raise RunLocked(f"{reason} ({patience_s:.0f} s were not enough)")
        raise ConfigError("run.name", self.path.name, reason)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def is_summed_up(self, steps: int) -> bool:
        """Return whether summary.json covers `steps` steps. A summary of fewer steps is older than an added phase."""
        try:
            return self.summary.exists() and read_json(self.summary, {"steps": int})["steps"] == steps
        except UnreadableFileError:
            return False

    def trim_metrics(self, step: int) -> None:
        """Remove the logged lines of steps after `step`, from which the run resumes. Raises `ConfigError` (key
        `run.name`) for a file that cannot be read.
        """
        lines = (self.metrics, "step", step), (self.online, "first_step", step - 1), (self.evaluations, "step", step)
        for path, key, last in lines:
            if path.exists():
                try:
                    kept = [json.dumps(line) for line in read_lines(path, {key: int}) if line[key] <= last]
                except (OSError, UnreadableFileError) as error:
                    raise unreadable(path, error) from None
                write_text(path, "".join(f"{line}\n" for line in kept))

    def _try_writing(self, elsewhere: str | None) -> None:
        """Write a probe file, so that a store without write access fails at the start, not at the first checkpoint."""
        probe = self.checkpoints / ".probe"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except Exception as error:  # stores raise their own errors
            if elsewhere is None:
                raise
            raise ConfigError("checkpoint.directory", elsewhere, f"cannot be written: {error}") from error

    def _check_same(self, config: TrainConfig) -> None:
        stored = absolute(load_config(self.path))
        done = max((step for step, _ in committed(self.checkpoints)), default=0)
        begun = sum(phase.start < done for phase in phases(stored)[1:])  # phases that may no longer change
        was, is_now = (_indexed(plain(without_derived(one))) for one in (stored, config))
        said = differences(was, is_now)  # report these first, because derived keys follow from them
        for key, (before, after) in {**said, **differences(_indexed(plain(stored)), _indexed(plain(config)))}.items():
            is_gone = isinstance(before, str) and isinstance(after, str) and os.path.abspath(after) == before
            if _is_fixed(key, begun) and not is_gone:  # the path of a file that is gone stays as the user wrote it
                reason = f"the run in {self.path} was started with {before}; restore it, or name a new run (run.name)"
                if key == "training.steps":
                    reason += ", or append a phase to train longer (phases)"
                raise ConfigError(key, after, reason)


def settings(config: TrainConfig) -> dict[str, Any]:
    """Return what a checkpoint stores of the configuration, to recognise its run: the values that the user set."""
    return _indexed(plain(without_derived(config)))


def check_settings(stored: dict[str, Any], config: TrainConfig, step: int, checkpoint: Path) -> None:
    """Raise `ConfigError` unless `stored`, the `settings` in a checkpoint of step `step`, are those of this run.

    A missing config.yaml or a checkpoint that was copied from another run would otherwise change what is learnt,
    silently. Keys that only one of the two versions of Leviathan has are not compared.
    """
    begun, now = sum(phase.start < step for phase in phases(config)[1:]), settings(config)
    for key, (before, after) in differences(stored, now).items():
        if _is_fixed(key, begun) and _has(stored, key) and _has(now, key):
            reason = (
                f"{checkpoint} is of a run with {before}; restore that value; to train with another, name a new run"
            )
            raise ConfigError(key, after, reason)


def _is_fixed(key: str, begun: int) -> bool:
    """Return whether a key must stay as it is once the first `begun` later phases have begun."""
    if key.startswith("phases.") and int(key.split(".")[1]) >= begun:
        return False
    anywhere = re.sub(r"^phases\.\d+\.", "phases.*.", key)
    return not any(anywhere == part or anywhere.startswith(f"{part}.") for part in FREE)


def _has(tree: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def load_config(directory: Path) -> TrainConfig:
    """Read the configuration in a run's directory."""
    path = directory / "config.yaml"
    if not path.exists():
        raise ConfigError("run", str(directory), "no run there: its config.yaml is missing")
    return read_config(path)


def read_config(path: Path) -> TrainConfig:
    """Read a resolved configuration in the form of `config.yaml`."""
    try:
        values = read_yaml(path)
        if not isinstance(values, dict):
            raise ConfigError("config", str(path), "has no keys: it is empty, or not a configuration")
        return build(TrainConfig, values)
    except OSError as error:
        raise ConfigError("config", str(path), f"cannot be read: {error.strerror}") from None
    except RenamedKeyError as error:
        raise ConfigError("run", str(path.parent), f"{path.name} is of an older format: {error}") from None
    except UnreadableFileError as error:
        raise ConfigError("config", None, str(error)) from None
    except ConfigError as error:
        if error.key == "config":
            raise
        raise ConfigError("run", str(path.parent), f"{path.name} has a damaged value, {error}") from None


def write_config(path: Path, config: TrainConfig) -> None:
    write_text(path, yaml.safe_dump(plain(config), sort_keys=False))


def read_lines(path: Path, shape: Any = object) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of a file, if it exists, that have a shape (`core.files.misfit`). Others are
    dropped: lines of another kind, and those that a kill or a full disk has truncated. Raises `UnreadableFileError` if
    it is not a regular file. One line at a time is in memory: evaluations.jsonl has every answer.
    """
    if not path.exists():
        return
    check_regular(path)
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for text in iter(partial(file.readline, TEXT_LIMIT), ""):
            yield from (line for line in parse_lines(text) if line is not None and not misfit(line, shape))


def unreadable(path: Path, error: OSError | UnreadableFileError) -> ConfigError:
    """Return what a user reads if a file of a run's directory, to which lines are appended, cannot be read."""
    reason = error.strerror if isinstance(error, OSError) else error
    return ConfigError(
        "run.name", path.parent.name, f"{path} cannot be read ({reason}); move it away to go on without it"
    )


def parse_lines(text: str) -> Iterator[dict[str, Any] | None]:
    """Yield each line of JSON, None for one that is truncated or no dict."""
    for part in text.splitlines():
        try:
            line = parse_json(part)
        except ValueError:
            line = None
        yield line if isinstance(line, dict) else None


class CommittedCheckpoint(NamedTuple):
    """A committed checkpoint on disk."""

    step: int
    path: Path


def committed(checkpoints: Path) -> list[CommittedCheckpoint]:
    """Return every checkpoint with a marker, oldest first."""
    found = list(checkpoints.iterdir()) if checkpoints.exists() else []
    steps = [path for path in found if path.name.startswith("step-") and path.name[5:].isdecimal()]
    marked = [CommittedCheckpoint(int(path.name[5:]), path) for path in steps if (path / MARKER).exists()]
    return sorted(marked, key=lambda one: one.step)


def _indexed(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace the list of phases by a dict with their positions as keys, so that each phase is compared separately."""
    return {**tree, "phases": {str(i): phase for i, phase in enumerate(tree["phases"])}}
