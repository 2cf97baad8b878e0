"""Read the data for a report from a run's directory. The data of an unfinished run end at its last logged step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.files import read_json
from model.config import FeedForward
from train.config import TrainConfig, phases
from train.run_directory import load_config, read_lines

SPIKE = 1.5
"""A logged loss is a spike if it exceeds the median of the ten logged losses before it by more than this many nats."""
UNEVEN = 4.0
"""A warning is given if an expert's load at the last logged step exceeds the mean load by more than this factor."""

_OPTIONAL = (float, None)
_PER_LAYER = ("router_entropy", "router_z")
_STEP = {
    **{"step": int, "loss": float, "tokens": int},
    **dict.fromkeys(("learning_rate?", "gradient_norm?", "tokens_per_second?", "peak_memory_bytes?"), _OPTIONAL),
    **{f"{key}?": [float] for key in _PER_LAYER},
    "expert_load?": [{"max_over_mean": float, "dead": int, str: float}],
}
_HELD_OUT = {"step": int, "heldout_loss": float, "heldout": {str: {"loss": float}}}
_SUMMARY = {
    **dict.fromkeys(("heldout_loss?", "bigram_loss?", "unigram_loss?", "tokens_per_second?"), _OPTIONAL),
    **dict.fromkeys(("peak_memory_bytes?", "total_parameters?", "active_parameters?", "world_size?"), (int, None)),
    "heldout?": (None, {"bits_per_byte?": _OPTIONAL, "sources?": {str: {"loss": float}}}),
}


class RunData:
    """Configuration, metrics, summary and log of one run.

    Raises `ConfigError` if `directory` has no run or the run has logged no step yet.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self.config: TrainConfig = load_config(directory)
        except ConfigError as error:
            raise ConfigError("runs", str(directory), error.reason) from None
        self.directory, self.name = directory, directory.resolve().name
        metrics, summary, log = (directory / name for name in ("metrics.jsonl", "summary.json", "log.txt"))
        self.lines, self.held_out = list(read_lines(metrics, _STEP)), list(read_lines(metrics, _HELD_OUT))
        if not self.lines:
            reason = f"has logged no step yet (one in {self.config.logging.every} is logged)"
            raise ConfigError("runs", str(directory), reason)
        self.summary: dict[str, Any] = read_json(summary, _SUMMARY) if summary.exists() else {}
        self.log = log.read_text(errors="replace").splitlines() if log.exists() else []

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    def values(self, key: str) -> list[float]:
        return [math.nan if line.get(key) is None else line[key] for line in self.lines]

    def figure(self, key: str) -> Any:
        """Return a metric from the summary or, if not there, from the last logged step. None if neither has it."""
        return self.summary.get(key, self.lines[-1].get(key))

    @cached_property
    def layers(self) -> list[int]:
        """Indices of the MoE layers whose load was logged."""
        return self._moe_layers if self._routed else []

    @cached_property
    def _moe_layers(self) -> list[int]:
        blocks = enumerate(self.config.model.blocks)
        return [index for index, layer in blocks if layer.feed_forward is FeedForward.moe]

    @property
    def layer_steps(self) -> list[int]:
        """Logged steps with metrics of MoE layers."""
        return [line["step"] for line in self._routed]

    def by_layer(self, key: str) -> list[list[float]]:
        """Return, for each MoE layer, the values of a router or expert-load metric at `layer_steps`."""
        table = [line.get(key) or [load.get(key, math.nan) for load in line["expert_load"]] for line in self._routed]
        return [list(series) for series in zip(*table, strict=True)]

    @cached_property
    def _routed(self) -> list[dict[str, Any]]:
        """Lines with a value for each MoE layer."""
        return [line for line in self.lines if "expert_load" in line and self._is_whole(line)]

    def _is_whole(self, line: dict[str, Any]) -> bool:
        lists = (line[key] for key in ("expert_load", *_PER_LAYER) if line.get(key))
        return all(len(values) == len(self._moe_layers) for values in lists)

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for each symptom that needs attention, with the value that shows it."""
        last, total = self.lines[-1], phases(self.config)[-1].stop
        if last["step"] < total:
            yield f"The run has reached step {last['step']:,} of {total:,}."
        held_out, bigram = self.summary.get("heldout_loss"), self.summary.get("bigram_loss")
        if held_out is not None and bigram is not None and held_out >= bigram:
            yield f"The held-out loss {held_out:.3f} is not below the bigram model's {bigram:.3f}."
        for index, load in zip(self.layers, last.get("expert_load", []), strict=False):
            if load["dead"]:
                yield f"Layer {index}: {load['dead']} experts got no token in the last logged step."
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
