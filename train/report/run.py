"""Read the data for a report from a run's directory. The data of an unfinished run end at its last logged step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from model.config import FeedForward
from train.config import Objective, TrainConfig, phases
from train.report.files import RunFiles, is_number
from train.report.ledger import ledger_rows
from train.run_directory import DIVERGED, load_config

SPIKE = 1.5
"""A logged loss is a spike if it exceeds the median of the ten logged losses before it by more than this many nats."""
UNEVEN = 4.0
"""A warning is given if an expert's load at the last logged step exceeds the mean load by more than this factor."""


class NoStepYet(ConfigError):
    """The run has not logged a step yet, but may do so later."""


class RunData:
    """Configuration, metrics, summary and log of one run. Damaged parts are left out and named in `warnings`.

    Raises `ConfigError` if `directory` has no run or no readable metrics, and `NoStepYet`.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            reason = "is a file, but must be a run's directory" if directory.exists() else "no such directory"
            raise ConfigError("runs", str(directory), reason)
        try:
            self.config: TrainConfig = load_config(directory)
        except ConfigError as error:
            raise ConfigError("runs", str(directory), error.reason) from None
        self.directory, self.name = directory, directory.resolve().name
        blocks, files = enumerate(self.config.model.blocks), RunFiles(directory)
        moe = [index for index, layer in blocks if layer.feed_forward is FeedForward.moe]
        self.lines, self.held_out = files.metrics(len(moe))
        self.problems = files.problems
        self.diverged = (directory / DIVERGED).exists()
        if not self.lines:
            self._refuse()
        self.layers = moe if any("expert_load" in line for line in self.lines) else []
        """Indices of the MoE layers whose load was logged."""
        self.summary, self.log = files.summary(), files.log()
        ledger = files.ledger()
        self.recovery = ledger_rows(ledger)
        """What recovery has done."""
        self.gave_up = bool(ledger) and ledger[-1].get("event") == "stop"
        self.examinations = files.examinations()
        """The scores of each examination, in the order in which it was asked."""
        self.prediction = files.prediction()
        """The planner's prediction; empty if there is none."""
        self.examples = files.examples()
        """Held-out documents with pictures and the model's answers."""

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    @property
    def ended(self) -> bool:
        """Whether the run has diverged, given up or written its summary: it logs no further step. A summary of fewer
        steps is older than an added phase.
        """
        done = self.summary.get("steps") == phases(self.config)[-1].stop
        return self.diverged or self.gave_up or done or "summary.json" in self.problems

    @property
    def unit(self) -> str:
        """The unit of losses."""
        match self.config.training.objective:
            case Objective.language:
                return "nats per token"
            case Objective.contrastive:
                return "nats per pair"

    def values(self, key: str) -> list[float]:
        found = (line.get(key) for line in self.lines)
        return [math.nan if value is None else value for value in found]

    def figure(self, key: str) -> Any:
        """Return a number from the summary or, if not there, from the last logged step. None if neither has it."""
        value = self.summary.get(key, self.lines[-1].get(key))
        return value if is_number(value) else None

    def has(self, key: str) -> bool:
        """Return whether a logged step or an evaluation has a metric."""
        return any(key in line for line in (*self.lines, *self.held_out))

    def layer_steps(self, modality: str | None = None) -> list[int]:
        """Return the logged steps with metrics of MoE layers; with `modality`, those with tokens of it."""
        return [line["step"] for line, _ in self._loads(modality)]

    def by_layer(self, key: str, modality: str | None = None) -> list[list[float]]:
        """Return, for each MoE layer, the values of a router or expert-load metric at `layer_steps`.

        `modality`: `images` or `text`, for the load of its tokens.
        """
        found = list(self._loads(modality))
        table = [line.get(key) or [load.get(key, math.nan) for load in loads] for line, loads in found]
        return [list(series) for series in zip(*table, strict=True)]

    def _loads(self, modality: str | None) -> Iterator[tuple[dict[str, Any], list[dict[str, float]]]]:
        """Yield the lines with loads of experts, each with the loads of its MoE layers."""
        for line in self.lines:
            loads = line.get("expert_load")
            if modality is not None:
                loads = line.get("expert_load_by_modality", {}).get(modality)
            if loads is not None and "expert_load" in line:
                yield line, loads

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for each symptom that needs attention, with the value that shows it."""
        yield from (f"{name}: {problem}." for name, problem in self.problems.items())
        last, total = self.lines[-1], phases(self.config)[-1].stop
        if self.diverged:
            yield f"The run diverged after step {last['step']:,}: its loss or gradient norm became NaN or infinite."
        if self.gave_up:
            yield "Recovery has stopped the run: the ledger below says why."
        if last["step"] < total:
            yield f"The run has reached step {last['step']:,} of {total:,}."
        held_out, bigram = self.summary.get("heldout_loss"), self.summary.get("bigram_loss")
        if held_out is not None and bigram is not None and held_out >= bigram:
            yield f"The held-out loss {held_out:.3f} is not below the bigram model's {bigram:.3f}."
        for index, load in zip(self.layers, last.get("expert_load", []), strict=False):
            if load["dead"]:
                total = self.config.model.num_experts
                yield f"Layer {index}: {load['dead']} of {total} experts got no token in the last logged step."
            elif load["max_over_mean"] > UNEVEN:
                yield f"Layer {index}: the busiest expert gets {load['max_over_mean']:.1f} times the mean."
        for place in range(10, len(self.lines)):
            median = sorted(line["loss"] for line in self.lines[place - 10 : place])[5]
            now = self.lines[place]
            if now["loss"] > median + SPIKE:
                yield f"The loss jumped from about {median:.2f} to {now['loss']:.2f} at step {now['step']:,}."
        for text in ("could not save", "is damaged", "is not recorded"):
            found = [line for line in self.log if text in line]
            if found:
                yield f"log.txt, {len(found)} times: {found[-1].split(' ', 2)[-1]}"

    def _refuse(self) -> None:
        """Raise the `ConfigError` of a run without logged steps."""
        if problem := self.problems.get("metrics.jsonl"):
            raise ConfigError("runs", str(self.directory), f"no logged step is left: metrics.jsonl: {problem}")
        if self.diverged:
            raise ConfigError("runs", str(self.directory), "diverged before it logged a step")
        reason = f"has logged no step yet (one in {self.config.logging.every} is logged)"
        raise NoStepYet("runs", str(self.directory), reason)


def units(runs: Sequence[RunData]) -> str:
    """Return the units of the runs' losses."""
    return " or ".join(dict.fromkeys(run.unit for run in runs))
