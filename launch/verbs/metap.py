"""The verb `metap`: hyperparameters from a small model to a large one.

`check`: do changes inside the model stay as large along width, depth and experts? `sweep`: train a grid of learning
rates. `fit`: the best rate, how sure that is, and what the sizes do to it. `transfer`: a base's hyperparameters in a
target's run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from core.config import build, load, plain
from core.errors import ConfigError
from core.files import write_bytes, write_json, write_text
from core.package_guard import sources_digest
from hparam.axes import SizeAxis
from hparam.coordinate_check import AxisResult, Measured, check_axis
from hparam.plots import draw_check
from hparam.rules import Parametrization
from hparam.transfer import Resolved, spans
from launch.metap.fit import FitConfig, fit
from launch.metap.sweep import SweepConfig, bases, sweep
from parallel.comm.world import connect
from train.config import TrainConfig
from train.corpus import get_corpus, run_loaders
from train.eval.contamination import MODELS
from train.metap.coordinates import changes
from train.metap.hyperparameters import as_base, derive, found_at, resolve, scale_of_run, without_derived
from train.metap.scaling import carried
from train.run_directory import load_config

WRITTEN = ("model", "training", "schedule", "phases", "optimizer", "hparam", "precision", "evaluation", "checkpoint")
"""Sections of a run that a transfer writes down. Data are not among them: a file's sources would join the default's."""
FROM_BASE = ("optimizer", "hparam")
"""Sections that a base gives to a target, beside `model.init`."""


class MetapAction(Enum):
    transfer = "transfer"
    check = "check"
    sweep = "sweep"
    fit = "fit"


@dataclass(frozen=True)
class CheckConfig:
    """`width`, `depth`, `experts`: the factors along each axis, none leaves it out. The head starts at zero and the
    router small, which leaves what is learnt: initial values times changes fall with the root of the width.
    """

    width: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    depth: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    experts: list[int] = field(default_factory=lambda: [1, 2, 4])
    steps: int = 5
    seeds: int = 3
    small_start: bool = True

    def __post_init__(self) -> None:
        for axis in ("width", "depth", "experts"):
            factors = getattr(self, axis)
            if factors and (len(factors) < 2 or factors != sorted(set(factors)) or factors[0] < 1):
                raise ConfigError(axis, None, "needs ascending factors, at least two, or none", ["[1,2,4]"])
        for key in ("steps", "seeds"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be positive")
        if not any((self.width, self.depth, self.experts)):
            raise ConfigError("width", None, "no axis is left to check")


@dataclass(frozen=True)
class MetapConfig:
    """Other keys are those of `leviathan train` and make the run (`train` keeps them): the base of a check or a sweep,
    the target of a transfer. `base`: what a transfer starts from, a file that `fit` wrote or the directory of a run.
    `name`: of the transferred run's file.
    """

    action: MetapAction = MetapAction.check
    out: str = "metap"
    train: list[str] = field(default_factory=lambda: ["experiment=smoke"])
    base: str | None = None
    name: str = "transferred"
    check: CheckConfig = field(default_factory=CheckConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if self.action is MetapAction.transfer and self.base is None:
            raise ConfigError("base", None, "name what to transfer from: a file that `metap fit` wrote, or a run")


def run(config: MetapConfig) -> int:
    """Returns the exit code: of a check 1 where a limit is exceeded."""
    out = Path(config.out).expanduser()
    (out / "experiment" if config.action is MetapAction.transfer else out).mkdir(parents=True, exist_ok=True)
    if config.action is MetapAction.transfer:
        return transfer(config, out)
    if config.action is MetapAction.fit:
        return fit(config.fit, out)
    if config.action is MetapAction.sweep:
        return sweep(config.sweep, bases(config.train), out)
    return check(config.check, load("train", TrainConfig, config.train), out)


def check(config: CheckConfig, run_: TrainConfig, out: Path) -> int:
    """Writes `coordinates.json` and `.png`."""
    if config.small_start:
        init = replace(run_.model.init, head_std=0.0, router_std=0.01 * run_.model.hidden_size**-0.5)
        run_ = replace(run_, model=replace(run_.model, init=init))
    if config.experts and not run_.model.has_experts:
        raise ConfigError("check.experts", None, "the model has no experts: check.experts=[]")
    run_ = without_derived(run_)
    if run_.hparam.base is not None:
        run_ = replace(run_, hparam=replace(run_.hparam, base=None))  # the smallest model is the base
    world = connect()
    corpus = get_corpus(run_, world, print, MODELS)
    measure = partial(_measure, run_, run_loaders(run_, corpus, lambda line: None), config.steps)
    axes: dict[SizeAxis, list[int]] = {SizeAxis[name]: getattr(config, name) for name in ("width", "depth", "experts")}
    results = [
        check_axis(measure, axis, factors, config.seeds, lambda line: print(f"check: {line}", flush=True))
        for axis, factors in axes.items()
        if factors
    ]
    failures = [line for result in results for line in result.failures()]
    content = {
        "pass": not failures,
        "failures": failures,
        "axes": {result.axis.value: result.plain() for result in results},
        "check": plain(config),
        "run": plain(run_),
    }
    write_json(out / "coordinates.json", content)
    write_bytes(out / "coordinates.png", draw_check(results))
    for line in _check_table(results):
        print(line)
    for line in failures:
        print(f"FAILED  {line}")
    print(f"{'NOT passed' if failures else 'passed'}: {out / 'coordinates.json'}, {out / 'coordinates.png'}")
    return 1 if failures else 0


def _measure(
    run_: TrainConfig, loaders: Any, steps: int, axis: SizeAxis, factor: int, seed: int, rules: Parametrization
) -> Measured:
    one = carried(replace(run_, run=replace(run_.run, seed=seed)), axis, factor, rules)
    batch = loaders["main"].batch(0)  # the same one at each step: what differs between sizes is then theirs
    return changes(one, [batch] * steps, batch)


def _check_table(results: Iterable[AxisResult]) -> Iterable[str]:
    yield f"{'slope of the change':<22}{'metap':>9}{'standard':>10}"
    for result in results:
        ours, theirs = result.slopes["metap"], result.slopes["standard"]
        for name, value in ours.items():
            yield f"{result.axis.value + ' ' + name:<22}{value:>+9.3f}{theirs[name]:>+10.3f}"


def transfer(config: MetapConfig, out: Path) -> int:
    """Writes `experiment/NAME.yaml`, which `leviathan train` takes, and `NAME.md`, the table for people."""
    assert config.base is not None
    target = load("train", TrainConfig, config.train)
    given = plain(without_derived(target))
    merged = {**given, "model": dict(given["model"])}
    read_base(Path(config.base).expanduser(), merged)
    for word in filter(_is_of_base, config.train):  # what is said of the target goes before what the base says
        _put(merged, _key(word), _at(given, _key(word)))
    merged["hparam"]["provenance"] |= {"base": config.base, "target": list(config.train), "code": sources_digest()}
    found = resolve(build(TrainConfig, merged))
    if found.hparam.base is None:
        raise ConfigError("base", config.base, "names no hparam.base; name the directory of the run that is to be one")
    lines = table(found, derive(found))
    head = "# @package _global_\n# Written by leviathan metap transfer; `train` derives every figure again.\n"
    path = out / "experiment" / f"{config.name}.yaml"
    sections = {key: plain(found)[key] for key in WRITTEN}
    write_text(path, head + yaml.safe_dump(sections, sort_keys=False))
    write_text(out / f"{config.name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    words = [f"hydra.searchpath=[file://{out.absolute()}]", f"experiment={config.name}", *_not_written(config.train)]
    print(f"\nwritten: {path}\nleviathan train {' '.join(map(shlex.quote, words))}")
    return 0


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")


def _is_of_base(word: str) -> bool:
    key = _key(word)
    if key == "hparam":  # which preset the target would take without this base
        return False
    return key.partition(".")[0] in FROM_BASE or key.startswith("model.init")


def _not_written(overrides: Iterable[str]) -> list[str]:
    """Overrides of other sections than those that the file holds."""
    return [word for word in overrides if _key(word).partition(".")[0] not in (*WRITTEN, "experiment", "hydra")]


def _at(tree: dict[str, Any], key: str) -> Any:
    place: Any = tree
    for part in key.split("."):
        place = place[part]
    return place


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    place = tree
    for part in path:
        place = place[part]
    place[last] = value


def read_base(path: Path, into: dict[str, Any]) -> None:
    """Put `optimizer`, `hparam` and `model.init` of a file that `fit` wrote, or of a run that becomes the base, in the
    place of those of a plain configuration.
    """
    if path.is_dir():
        stored = plain(as_base(load_config(path)))
        content = {**{key: stored[key] for key in FROM_BASE}, "model": {"init": stored["model"]["init"]}}
    else:
        try:
            content = yaml.safe_load(path.read_text())
            content = {**{key: content[key] for key in FROM_BASE}, "model": {"init": content["model"]["init"]}}
        except OSError as error:
            raise ConfigError("base", str(path), f"cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            reason = f"is no base: it needs optimizer, hparam and model.init, as `metap fit` writes them ({error})"
            raise ConfigError("base", str(path), reason) from None
    into |= {key: content[key] for key in FROM_BASE}
    into["model"]["init"] = content["model"]["init"]
    into["hparam"] = {"provenance": {}, **into["hparam"]}


def table(config: TrainConfig, found: Resolved) -> list[str]:
    """Every role's figures at the base and here, as Markdown."""
    base, target = config.hparam.base, scale_of_run(config)
    assert base is not None
    before = found_at(base, list(found.roles), without_derived(config).model, config.optimizer)
    lines = [
        f"| size | {' | '.join(plain(base))} |",
        f"|---|{'---|' * len(plain(base))}",
        f"| base | {' | '.join(f'{value:,}' for value in plain(base).values())} |",
        f"| target | {' | '.join(f'{value:,}' for value in plain(target).values())} |",
        "",
        "| role | matrix | std at the base | std | lr at the base | lr | eps | weight decay |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for role, own in found.roles.items():
        stds = ("1", "1") if own.std is None else (f"{before.std[role]:.4g}", f"{own.std:.4g}")
        eps = "Muon" if role in before.muon else f"{own.eps:.2e}"
        cells = [role.name, spans(role), *stds, f"{before.lr[role]:.3e}", f"{own.lr:.3e}", eps]
        lines.append(f"| {' | '.join([*cells, f'{own.weight_decay:.4g}'])} |")
    factors = ", ".join(f"{key} {value:.6g}" for key, value in plain(found.multipliers).items())
    tau = "none" if found.tau is None else f"{found.tau:.3g} of the run"
    lines += ["", f"Multipliers: {factors}. beta2: {found.beta2:.6g}. Weight decay forgets over: {tau}."]
    lines += [f"Rules: {config.hparam.rules.value}, table {found.digest}."]
    return [*lines, *(f"Warning: {line}." for line in found.warnings)]
