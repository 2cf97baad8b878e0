"""Define the runs of a sweep: their configurations, directories and results.

A run's directory holds its configuration and its held-out loss. A stopped sweep resumes from the directories, and a
fit reads nothing else.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from core.config import differences, groups, load, plain
from core.errors import ConfigError, Diverged, LeviathanError, UnreadableFileError
from core.files import read_json
from core.overrides import expand
from hparam.axes import SizeAxis
from hparam.rules import Parametrization
from launch.local import train
from launch.metap.config import SweepConfig
from train.config import TrainConfig
from train.metap.hyperparameters import resolve, without_derived
from train.metap.scaling import carried
from train.run_directory import DIVERGED, RunDirectory, load_config

RUNS = "runs"


@dataclass(frozen=True)
class SweepSetting:
    """A `base` scaled by `factor` under one parametrization. `label` distinguishes several bases."""

    base: TrainConfig
    factor: int = 1
    rules: Parametrization = Parametrization.metap
    label: str = ""

    def name(self, axis: SizeAxis | None) -> str:
        first = "base" if axis is None else f"{axis.value}-x{self.factor}-{self.rules.value}"
        return f"{first}-{self.label}" if self.label else first


def bases(overrides: Sequence[str]) -> dict[str, TrainConfig]:
    """Load one configuration per combination of the values in overrides of `leviathan train`. The keys are labels made
    of the values that vary.
    """
    points = expand(overrides, groups())
    varying = [place for place in range(len(overrides)) if len({point[place] for point in points}) > 1]
    for place in varying:
        if (key := overrides[place].partition("=")[0]) in ("optimizer.lr", "run.seed"):
            raise ConfigError(key, None, "is swept by sweep.low, sweep.high and sweep.seeds: give one value, or none")
    labels = ["-".join(_short(point[place]) for place in varying) for point in points]
    return {label: load("train", TrainConfig, point) for label, point in zip(labels, points, strict=True)}


def _short(override: str) -> str:
    """Shorten optimizer.weight_decay=0.1 to weight_decay=0.1. Replaces characters that are unsafe in file names."""
    key, _, value = override.partition("=")
    return re.sub(r"[^\w.=+-]", "_", f"{key.rpartition('.')[2]}={value}")


def settings(config: SweepConfig, runs: Mapping[str, TrainConfig]) -> list[SweepSetting]:
    """Return every combination of run, factor and rules."""
    factors = config.factors if config.axis is not None else [1]
    every = itertools.product(runs.items(), factors, config.rules)
    return [SweepSetting(without_derived(run), factor, rules, label) for (label, run), factor, rules in every]


def member(config: SweepConfig, one: SweepSetting, log2_lr: float, seed: int, out: Path) -> TrainConfig:
    """Return the configuration of one run of the sweep, with its directory inside the sweep's. If Muon has a separate
    rate, it changes in proportion.
    """
    base, rate = one.base, 2.0**log2_lr
    muon = base.optimizer.muon
    if muon.lr is not None:
        muon = replace(muon, lr=float(f"{muon.lr * rate / base.optimizer.lr:.10g}"))
    name = f"{one.name(config.axis)}-lr{log2_lr:g}-seed{seed}"
    run = replace(base.run, root=str(out / RUNS), name=name, seed=seed)
    logging = replace(base.logging, report=False)
    named = replace(base, run=run, logging=logging, optimizer=replace(base.optimizer, lr=rate, muon=muon))
    return resolve(named) if config.axis is None else carried(named, config.axis, one.factor, one.rules)


def is_done(run: TrainConfig) -> bool:
    """Return whether the run has finished. Raises `ConfigError` if its directory holds another configuration."""
    path = RunDirectory.of(run).path
    if (path / "config.yaml").exists():
        old, new = (plain(but_rate_and_seed(one)) for one in (load_config(path), run))
        for key, (before, after) in differences(old, new).items():
            reason = f"{path.name} was swept with {key}={before}, now {after}: choose another out="
            raise ConfigError("out", str(path.parent.parent), reason)
    return loss_of(path) is not None


def but_rate_and_seed(run: TrainConfig) -> TrainConfig:
    """Return the configuration without what may differ between runs of one setting: rate, seed, name, launch."""
    bare = without_derived(run)
    muon = bare.optimizer.muon
    if muon.lr is not None:
        muon = replace(muon, lr=float(f"{muon.lr / bare.optimizer.lr:.6g}"))
    optimizer = replace(bare.optimizer, lr=1.0, muon=muon)
    bare = replace(bare, optimizer=optimizer, hparam=replace(bare.hparam, provenance={}))
    return replace(bare, run=replace(bare.run, root="-", name="-", seed=0), launch={}, logging=type(bare.logging)())


def one_run(run: TrainConfig) -> int:
    """Train a run; return its exit code, or 0 if it diverged. Raises other errors, which end the sweep."""
    diverged = RunDirectory.of(run).path / DIVERGED
    try:
        code = train([run])
    except LeviathanError as error:
        if not isinstance(error, Diverged) and not diverged.exists():
            raise
        return 0
    return 0 if diverged.exists() else code


def loss_of(path: Path) -> float | None:
    """Return the held-out loss of a finished run, inf if it diverged, or None if it is unfinished."""
    if (path / DIVERGED).exists():
        return math.inf
    try:
        return float(read_json(path / "summary.json", {"heldout_loss": float})["heldout_loss"])
    except (OSError, UnreadableFileError):
        return None
