"""Learning-rate sweeps of runs and of families of runs, and what is found in them.

A run's directory is the authority: it holds the configuration and the held-out loss, so a sweep that was stopped goes
on where it was, and a fit needs nothing but the directories.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from core.config import build, differences, plain
from core.errors import ConfigError, Diverged, LeviathanError
from core.files import read_json, write_bytes, write_json, write_text
from hparam.axes import Axis
from hparam.fit import Curve, curve, drift, exponents, foretold, optimum, penalty, plain_optimum
from hparam.plots import draw_optima, draw_sweep
from hparam.rules import Parametrization
from launch.local import train
from launch.settings import LaunchConfig, LaunchKind
from train.config import TrainConfig
from train.families import carried
from train.hyperparameters import resolve, scale_of_run, without_derived
from train.run_directory import DIVERGED, load_config

RUNS = "runs"


@dataclass(frozen=True)
class SweepConfig:
    """Rates are 2^`low` to 2^`high` in steps of `step` octaves, of the base; each with `seeds` seeds. With an `axis`
    the run is the base of a family, one member for each of `factors`, its hyperparameters carried over by each of
    `rules`.
    """

    low: float = -10.0
    high: float = -5.0
    step: float = 1.0
    seeds: int = 2
    axis: Axis | None = None
    factors: list[int] = field(default_factory=lambda: [1, 2, 4])
    rules: list[Parametrization] = field(default_factory=lambda: [Parametrization.metap])
    processes: int = 1
    """How many runs at once on this machine, with launch=inline; each has its share of the cores."""
    trials: int | None = None
    """Search instead of a grid: as many runs of each setting, rates proposed by Optuna (the extra `search`) between the
    same bounds. Several machines that share `out` share the search.
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
class FitConfig:
    """`runs`: directories of runs, or of sweeps; none: the sweep in `out`."""

    runs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """A member of the family under one parametrization."""

    factor: int
    rules: Parametrization

    def name(self, axis: Axis | None) -> str:
        return "base" if axis is None else f"{axis.value}-x{self.factor}-{self.rules.value}"


def settings(config: SweepConfig) -> list[Setting]:
    factors = config.factors if config.axis is not None else [1]
    return [Setting(factor, rules) for rules in config.rules for factor in factors]


def member(config: SweepConfig, base: TrainConfig, one: Setting, log2_lr: float, seed: int, out: Path) -> TrainConfig:
    """A run of the sweep, under its name in the sweep's folder."""
    rate = replace(base, optimizer=replace(base.optimizer, lr=2.0**log2_lr))
    name = f"{one.name(config.axis)}-lr{log2_lr:g}-seed{seed}"
    named = replace(rate, run=replace(base.run, root=str(out / RUNS), name=name, seed=seed))
    named = replace(named, logging=replace(base.logging, report=False))
    return resolve(named) if config.axis is None else carried(named, config.axis, one.factor, one.rules)


def sweep(config: SweepConfig, base: TrainConfig, out: Path) -> int:
    """Train what is not done yet; returns the exit code. A run that diverges is a result."""
    base = without_derived(base)
    launch = build(LaunchConfig, base.launch, "launch")
    if config.processes > 1 and launch.kind is not LaunchKind.inline:
        raise ConfigError("sweep.processes", config.processes, "is for launch=inline", [1])
    if config.trials is not None:
        from launch.search import search

        return search(config, base, out)
    wanted = [
        member(config, base, one, log2_lr, seed, out)
        for one in settings(config)
        for log2_lr in config.log2_rates
        for seed in range(config.seeds)
    ]
    waiting = [run for run in wanted if loss_of(_directory(run)) is None]
    print(f"sweep: {len(wanted)} runs, {len(wanted) - len(waiting)} done before", flush=True)
    if launch.kind is LaunchKind.slurm:
        return train(waiting) if waiting else 0
    began, code = time.monotonic(), 0
    for number, (name, one) in enumerate(_results(waiting, config.processes), 1):
        code = code or one
        loss = loss_of(out / RUNS / name)
        told = "failed" if loss is None else "diverged" if math.isinf(loss) else f"{loss:.4f}"
        left = (time.monotonic() - began) / number * (len(waiting) - number)
        print(f"sweep: {number} of {len(waiting)}  {name}  {told}  {left:.0f} s left", flush=True)
    return code


def _directory(run: TrainConfig) -> Path:
    return Path(run.run.root) / str(run.run.name)


def _results(waiting: Sequence[TrainConfig], processes: int) -> Iterator[tuple[str, int]]:
    """Name and exit code of each run as it ends."""
    if processes == 1:
        yield from ((str(run.run.name), one_run(run)) for run in waiting)
        return
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        futures = {pool.submit(_quiet_run, run): str(run.run.name) for run in waiting}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _quiet_run(run: TrainConfig) -> int:
    """What a run says is in its own log.txt; side by side it would be a muddle."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return one_run(run)


def one_run(run: TrainConfig) -> int:
    """Train; 0 also where it diverged. Other errors end the sweep."""
    try:
        return train([run])
    except Diverged:
        return 0
    except ConfigError:
        raise
    except LeviathanError:
        if (_directory(run) / DIVERGED).exists():
            return 0
        raise


def loss_of(directory: Path) -> float | None:
    """Held-out loss of a finished run, inf of one that diverged, None of one that is not done."""
    if (directory / DIVERGED).exists():
        return math.inf
    try:
        return float(read_json(directory / "summary.json")["heldout_loss"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def collect(roots: Sequence[Path]) -> dict[str, dict[str, Curve]]:
    """The curves of all runs below these directories, by parametrization and setting."""
    found = [path.parent for root in roots for path in sorted(root.rglob("config.yaml"))]
    if not found:
        raise ConfigError("fit.runs", None, f"no run in {', '.join(map(str, roots))}")
    groups: dict[str, list[tuple[TrainConfig, float]]] = {}
    unfinished = []
    for directory in found:
        run, loss = load_config(directory), loss_of(directory)
        if loss is None:
            unfinished.append(directory)
            continue
        key = json.dumps(plain(_but_rate_and_seed(run)), sort_keys=True)
        groups.setdefault(key, []).append((run, loss))
    if unfinished:
        raise ConfigError("fit.runs", str(unfinished[0]), f"{len(unfinished)} runs are not done: let the sweep end")
    first = [runs[0][0] for runs in groups.values()]
    curves: dict[str, dict[str, Curve]] = {}
    for runs, name in zip(groups.values(), _names(first), strict=True):
        losses: dict[float, dict[int, float]] = {}
        for run, loss in runs:
            losses.setdefault(run.optimizer.lr, {})[run.run.seed] = loss
        one = curve(name, losses, scale_of_run(runs[0][0]))
        curves.setdefault(runs[0][0].hparam.rules.value, {})[name] = one
    return {rules: dict(sorted(by.items(), key=lambda item: _order(item[1]))) for rules, by in curves.items()}


def _but_rate_and_seed(run: TrainConfig) -> TrainConfig:
    bare = without_derived(run)
    bare = replace(bare, optimizer=replace(bare.optimizer, lr=1.0), hparam=replace(bare.hparam, provenance={}))
    return replace(bare, run=replace(bare.run, root="", name="", seed=0), launch={}, logging=type(bare.logging)())


def _names(runs: Sequence[TrainConfig]) -> list[str]:
    """Settings by the sizes in which they differ, or by whatever else does."""
    scales = [asdict(scale_of_run(run)) for run in runs]
    varying = [size for size in scales[0] if len({scale[size] for scale in scales}) > 1]
    shown = [size for size in ("width", "layers", "experts", "batch", "tokens") if size in varying]
    names = [", ".join(f"{size} {scale[size]:,}" for size in shown) or "base" for scale in scales]
    rules = [run.hparam.rules.value for run in runs]
    if len(set(zip(names, rules, strict=True))) == len(runs):
        return names
    trees = [plain(_but_rate_and_seed(run)) for run in runs]
    other = [
        ", ".join(
            f"{key} {new}" for key, (_, new) in differences(trees[0], tree).items() if not key.startswith("model")
        )
        for tree in trees
    ]
    return [f"{name}, {more}" if more else name for name, more in zip(names, other, strict=True)]


def _order(one: Curve) -> tuple[float, ...]:
    assert one.scale is not None
    return tuple(float(value) for value in asdict(one.scale).values())


def fit(config: FitConfig, out: Path) -> int:
    """Writes `fit.json`, pictures, and `base.yaml`, from which a transfer starts: the smallest setting under metap."""
    roots = [Path(path).expanduser() for path in config.runs] or [out / RUNS]
    curves = collect(roots)
    content: dict[str, Any] = {}
    for rules, by in curves.items():
        content[rules] = _found(by)
        for name, one in content[rules]["optima"].items():
            interval, loss = one["log2_lr"], one["loss"]["value"]
            print(
                f"fit: {rules} {name}: best 2^{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
                f" = {one['lr']:.3g}, loss {loss:.4f}"
            )
        for key in ("drift_octaves", "penalty_nats"):
            if key in content[rules]:
                shown = content[rules][key]
                print(
                    f"fit: {rules} {key.replace('_', ' in ')}: {shown['value']:+.3f} [{shown['low']:+.3f}, "
                    f"{shown['high']:+.3f}]"
                )
    write_bytes(out / "sweep.png", draw_sweep({rules: list(by.values()) for rules, by in curves.items()}))
    chosen = curves.get(Parametrization.metap.value)
    if chosen is not None:
        for size in ("batch", "tokens", "width", "layers"):
            varied = [one for one in chosen.values()]
            if len({getattr(one.scale, size) for one in varied}) > 2:
                write_bytes(out / f"optima_{size}.png", draw_optima(varied, size))
        _write_base(roots, chosen, content[Parametrization.metap.value], out)
    write_json(out / "fit.json", content)
    print(f"fit: {out / 'fit.json'}, {out / 'sweep.png'}" + (f", {out / 'base.yaml'}" if chosen else ""))
    return 0


def _found(by: Mapping[str, Curve]) -> dict[str, Any]:
    """Optima (all bracketed, or this raises), and what changes from the first setting to the last."""
    curves = list(by.values())
    found: dict[str, Any] = {"optima": {name: plain_optimum(optimum(one)) for name, one in by.items()}}
    if len(curves) > 1:
        found["drift_octaves"] = asdict(drift(curves[0], curves[-1]))
        found["penalty_nats"] = asdict(penalty(curves[0], curves[-1]))
        found["exponents"] = {size: asdict(one) for size, one in exponents(curves).items()}
        found["foretold"] = foretold(curves)
    found["losses"] = {
        name: {f"{rate:g}": losses for rate, losses in zip(one.log2_lrs.tolist(), one.losses.tolist(), strict=True)}
        for name, one in by.items()
    }
    return found


def _write_base(roots: Sequence[Path], curves: Mapping[str, Curve], found: Mapping[str, Any], out: Path) -> None:
    """The setting that costs least, with its best rate, as a base."""
    name, smallest = next(iter(curves.items()))
    runs = [load_config(path.parent) for root in roots for path in sorted(root.rglob("config.yaml"))]
    run = next(one for one in runs if scale_of_run(one) == smallest.scale and one.hparam.rules is Parametrization.metap)
    run = without_derived(run)
    best = found["optima"][name]
    powers = found.get("exponents", {})
    measured = (
        {} if "tokens" not in powers else {"tokens_exponent": -powers["tokens"]["value"] + run.hparam.tokens_exponent}
    )
    provenance = {
        "runs": sum(one.losses.size for one in curves.values()),
        "log2_lr": best["log2_lr"],
        "loss": best["loss"],
        **({"exponents": powers} if powers else {}),
        **({"foretold": found["foretold"]} if found.get("foretold") else {}),
    }
    hparam = replace(run.hparam, base=smallest.scale, provenance=provenance, **measured)
    optimizer = replace(run.optimizer, lr=float(f"{best['lr']:.4g}"))
    content = {"optimizer": plain(optimizer), "hparam": plain(hparam), "model": {"init": plain(run.model.init)}}
    head = "# @package _global_\n# Written by leviathan metap fit: the best of a sweep at this size.\n"
    write_text(out / "base.yaml", head + yaml.safe_dump(content, sort_keys=False))
