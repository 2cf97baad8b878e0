"""Sweeps of learning rates over a run, a family of runs, and whatever else is given several values.

A run's directory is the authority: it holds the configuration and the held-out loss, so a sweep that was stopped goes
on where it was, and a fit needs nothing but the directories.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import multiprocessing
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from core.config import build, differences, expand, load, plain
from core.errors import ConfigError, Diverged, LeviathanError
from core.exit_codes import INTERRUPTED
from core.files import read_json
from hparam.axes import SizeAxis
from hparam.rules import Parametrization
from launch.config import LaunchConfig, LaunchKind
from launch.local import train
from train.config import TrainConfig
from train.metap.hyperparameters import resolve, without_derived
from train.metap.scaling import carried
from train.run_directory import DIVERGED, load_config

RUNS = "runs"


@dataclass(frozen=True)
class SweepConfig:
    """Rates are 2^`low` to 2^`high` in steps of `step` octaves, of the base; each with `seeds` seeds. With an `axis`
    the run is the base of a family, one member for each of `factors`, its hyperparameters carried over by each of
    `rules`. Other keys of the run may have several values, too (optimizer.weight_decay=0.05,0.1).
    """

    low: float = -10.0
    high: float = -5.0
    step: float = 1.0
    seeds: int = 2
    axis: SizeAxis | None = None
    factors: list[int] = field(default_factory=lambda: [1, 2, 4])
    rules: list[Parametrization] = field(default_factory=lambda: [Parametrization.metap])
    processes: int = 1
    """How many runs at once on this machine, with launch=inline; each has its share of the cores."""
    trials: int | None = None
    """Search instead of a grid of rates: as many of them for each setting, proposed by Optuna (the extra `search`)
    between the same bounds. Several machines that share `out` share the search.
    """

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError("low", self.low, f"must be below sweep.high={self.high:g}")
        if not self.step > 0:
            raise ConfigError("step", self.step, "must be positive", [1.0, 0.5])
        for key in ("seeds", "processes"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be positive")
        if self.trials is not None and self.trials < 3:
            raise ConfigError("trials", self.trials, "a minimum needs three", [12])
        if not self.factors or not self.rules:
            raise ConfigError("factors" if not self.factors else "rules", None, "needs at least one")

    @property
    def log2_rates(self) -> list[float]:
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [self.low + index * self.step for index in range(count)]


@dataclass(frozen=True)
class SweepSetting:
    """A member of the family of `base` under one parametrization. `label` tells bases apart."""

    base: TrainConfig
    factor: int = 1
    rules: Parametrization = Parametrization.metap
    label: str = ""

    def name(self, axis: SizeAxis | None) -> str:
        first = "base" if axis is None else f"{axis.value}-x{self.factor}-{self.rules.value}"
        return f"{first}-{self.label}" if self.label else first


def bases(overrides: Sequence[str]) -> dict[str, TrainConfig]:
    """The runs that overrides of `leviathan train` describe, one for each combination of values where keys have
    several, by what tells them apart.
    """
    points = expand(overrides)
    varying = [place for place in range(len(overrides)) if len({point[place] for point in points}) > 1]
    for place in varying:
        if (key := overrides[place].partition("=")[0]) in ("optimizer.lr", "run.seed"):
            raise ConfigError(key, None, "is swept by sweep.low, sweep.high and sweep.seeds: give one value, or none")
    labels = ["-".join(_short(point[place]) for place in varying) for point in points]
    return {label: load("train", TrainConfig, point) for label, point in zip(labels, points, strict=True)}


def _short(override: str) -> str:
    """optimizer.weight_decay=0.1 -> weight_decay=0.1, without what a file's name cannot hold."""
    key, _, value = override.partition("=")
    return re.sub(r"[^\w.=+-]", "_", f"{key.rpartition('.')[2]}={value}")


def settings(config: SweepConfig, runs: Mapping[str, TrainConfig]) -> list[SweepSetting]:
    factors = config.factors if config.axis is not None else [1]
    every = itertools.product(runs.items(), factors, config.rules)
    return [SweepSetting(without_derived(run), factor, rules, label) for (label, run), factor, rules in every]


def member(config: SweepConfig, one: SweepSetting, log2_lr: float, seed: int, out: Path) -> TrainConfig:
    """A run of the sweep, under its name in the sweep's folder. A rate that Muon's matrices have of their own moves in
    proportion.
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


def sweep(config: SweepConfig, runs: Mapping[str, TrainConfig], out: Path) -> int:
    """Train what is not done yet; returns the exit code. A run that diverges is a result."""
    launch = build(LaunchConfig, next(iter(runs.values())).launch, "launch")
    if config.processes > 1 and launch.kind is not LaunchKind.inline:
        raise ConfigError("sweep.processes", config.processes, "is for launch=inline", [1])
    if config.trials is not None:
        from launch.metap.search import search

        if launch.kind is LaunchKind.slurm:
            reason = "waits for each run: start it in a job, with launch=inline or launch=torchrun"
            raise ConfigError("sweep.trials", config.trials, reason)
        return search(config, settings(config, runs), out)
    wanted = [
        member(config, one, log2_lr, seed, out)
        for one in settings(config, runs)
        for log2_lr in config.log2_rates
        for seed in range(config.seeds)
    ]
    waiting = [run for run in wanted if not is_done(run)]
    print(f"sweep: {len(wanted)} runs, {len(wanted) - len(waiting)} done before", flush=True)
    if launch.kind is LaunchKind.slurm:
        return train(waiting) if waiting else 0
    began, code = time.monotonic(), 0
    for number, (name, one) in enumerate(_results(waiting, config.processes), 1):
        if one == INTERRUPTED:
            return one
        code = code or one
        loss = loss_of(out / RUNS / name)
        told = "failed" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.4f}"
        left = (time.monotonic() - began) / number * (len(waiting) - number)
        print(f"sweep: {number} of {len(waiting)}  {name}  {told}  {left:.0f} s left", flush=True)
    return code


def directory(run: TrainConfig) -> Path:
    return Path(run.run.root) / str(run.run.name)


def is_done(run: TrainConfig) -> bool:
    """Raises `ConfigError` where its directory holds a run of another configuration."""
    path = directory(run)
    if (path / "config.yaml").exists():
        old, new = (plain(but_rate_and_seed(one)) for one in (load_config(path), run))
        for key, (before, after) in differences(old, new).items():
            reason = f"{path.name} was swept with {key}={before}, now {after}: choose another out="
            raise ConfigError("out", str(path.parent.parent), reason)
    return loss_of(path) is not None


def but_rate_and_seed(run: TrainConfig) -> TrainConfig:
    """What runs of one curve have in common."""
    bare = without_derived(run)
    muon = bare.optimizer.muon
    if muon.lr is not None:
        muon = replace(muon, lr=float(f"{muon.lr / bare.optimizer.lr:.6g}"))
    optimizer = replace(bare.optimizer, lr=1.0, muon=muon)
    bare = replace(bare, optimizer=optimizer, hparam=replace(bare.hparam, provenance={}))
    return replace(bare, run=replace(bare.run, root="", name="", seed=0), launch={}, logging=type(bare.logging)())


def _results(waiting: Sequence[TrainConfig], processes: int) -> Iterator[tuple[str, int]]:
    """Name and exit code of each run as it ends."""
    if processes == 1:
        yield from ((str(run.run.name), one_run(run)) for run in waiting)
        return
    threads = max(1, torch.get_num_threads() // processes)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(_quiet_run, run): str(run.run.name) for run in waiting}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _quiet_run(run: TrainConfig) -> int:
    """What a run says is in its own log.txt; side by side it would be a muddle."""
    with contextlib.redirect_stdout(io.StringIO()):
        return one_run(run)


def one_run(run: TrainConfig) -> int:
    """Train; 0 also where it diverged, in this process or in ranks. Other errors end the sweep."""
    diverged = directory(run) / DIVERGED
    try:
        code = train([run])
    except Diverged:
        return 0
    except LeviathanError:
        if diverged.exists():
            return 0
        raise
    return 0 if diverged.exists() else code


def loss_of(path: Path) -> float | None:
    """Held-out loss of a finished run, inf of one that diverged, None of one that is not done."""
    if (path / DIVERGED).exists():
        return math.inf
    try:
        return float(read_json(path / "summary.json")["heldout_loss"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
