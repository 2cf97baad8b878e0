"""Fit a sweep: best learning rates, confidence intervals, dependence on sizes, and a base for transfers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from core.config import differences, plain
from core.errors import ConfigError
from core.files import write_bytes, write_json, write_text
from core.package_guard import sources_digest
from hparam.fit import Curve, curve, drift, exponents, optimum, penalty, plain_optimum, predicted_optimum
from hparam.plots import draw_optima, draw_sweep
from hparam.rules import Parametrization
from launch.metap.config import FitConfig
from launch.metap.runs import RUNS, but_rate_and_seed, loss_of
from train.config import TrainConfig
from train.metap.hyperparameters import as_base, scale_of_run
from train.run_directory import load_config

WIDEST = 0.15
"""An exponent is used only if the half width of its confidence interval is at most this."""
TRUSTED = 0.5
"""Octaves (factors of 2) by which the best rate of the largest setting may differ from the prediction of the others."""
FITTED = {"tokens": "tokens_exponent", "batch": "batch_exponent"}


@dataclass(frozen=True)
class Member:
    """A setting: the runs that differ only in rate and seed. `curve`: their losses. `run`: one configuration."""

    curve: Curve
    run: TrainConfig


Members = dict[str, dict[str, Member]]
"""Members by parametrization and by name of the setting. The smallest setting comes first."""


def collect(roots: Sequence[Path]) -> Members:
    """Group all runs below these directories by setting."""
    paths = [path.parent for root in roots for path in sorted(root.rglob("config.yaml"))]
    if not paths:
        raise ConfigError("fit.runs", None, f"no run in {', '.join(map(str, roots))}")
    groups: dict[str, list[tuple[TrainConfig, float]]] = {}
    unfinished = []
    for path in paths:
        run, loss = load_config(path), loss_of(path)
        if loss is None:
            unfinished.append(path)
            continue
        groups.setdefault(json.dumps(plain(but_rate_and_seed(run)), sort_keys=True), []).append((run, loss))
    if unfinished:
        raise ConfigError("fit.runs", str(unfinished[0]), f"{len(unfinished)} runs are unfinished: let the sweep end")
    found: Members = {}
    for runs, name in zip(groups.values(), _names([runs[0][0] for runs in groups.values()]), strict=True):
        losses: dict[float, dict[int, float]] = {}
        for run, loss in runs:
            losses.setdefault(run.optimizer.lr, {})[run.run.seed] = loss
        first = runs[0][0]
        member = Member(curve(name, losses, scale_of_run(first)), first)
        found.setdefault(first.hparam.rules.value, {})[name] = member
    seeds = {name: one.curve.losses.shape[1] for by in found.values() for name, one in by.items()}
    if len(set(seeds.values())) > 1:
        counts = ", ".join(f"{count} of {name}" for name, count in seeds.items())
        reason = f"settings are compared seed by seed and need equal numbers of seeds, not {counts}"
        raise ConfigError("fit.runs", None, reason)
    return {rules: dict(sorted(by.items(), key=lambda item: _order(item[1]))) for rules, by in found.items()}


def _order(one: Member) -> tuple[float, ...]:
    """Return the sort key of a setting: its sizes, then its lowest mean loss."""
    assert one.curve.scale is not None
    return (*map(float, asdict(one.curve.scale).values()), float(one.curve.losses.mean(1).min()))


def _names(runs: Sequence[TrainConfig]) -> list[str]:
    """Name settings by the sizes in which they differ; if that is ambiguous, also by other keys."""
    scales = [asdict(scale_of_run(run)) for run in runs]
    sizes = ("hidden_size", "num_layers", "num_experts", "batch", "tokens")
    shown = [size for size in sizes if len({scale[size] for scale in scales}) > 1]
    names = [", ".join(f"{size} {scale[size]:,}" for size in shown) for scale in scales]
    keys = [(name, run.hparam.rules) for name, run in zip(names, runs, strict=True)]
    if len(set(keys)) < len(runs):
        trees = [plain(but_rate_and_seed(run)) for run in runs]
        others = [[f"{key}={new}" for key, (_, new) in differences(trees[0], tree).items()] for tree in trees]
        names = [", ".join([name] * bool(name) + other) for name, other in zip(names, others, strict=True)]
    return [name or "base" for name in names]


def fit(config: FitConfig, out: Path) -> int:
    """Fit the runs, print and write the results, and return the exit code. Raises `ConfigError` if a best rate under
    metap is at an edge of the grid.
    """
    roots = [Path(path).expanduser() for path in config.runs] or [out / RUNS]
    members = collect(roots)
    curves = {rules: [one.curve for one in by.values()] for rules, by in members.items()}
    write_bytes(out / "sweep.png", draw_sweep(curves))
    content: dict[str, Any] = {}
    for rules, those in curves.items():
        try:
            content[rules] = _found(those)
        except ConfigError as error:
            if rules == Parametrization.metap.value:
                raise
            content[rules] = {"unbracketed": str(error)}
            print(f"fit: {rules}: {error}")
            continue
        _say(rules, content[rules], those[0].losses.shape[1])
    write_json(out / "fit.json", content)
    written = ["fit.json", "sweep.png"]
    if (metap := Parametrization.metap.value) in members:
        for size in ("batch", "tokens", "hidden_size", "num_layers"):
            if len({getattr(one.scale, size) for one in curves[metap]}) > 2:
                write_bytes(out / f"optima_{size}.png", draw_optima(curves[metap], size))
                written.append(f"optima_{size}.png")
        _write_base(roots, members[metap], content[metap], out)
        written.append("base.yaml")
    print(f"fit: {', '.join(str(out / name) for name in written)}")
    return 0


def _found(curves: Sequence[Curve]) -> dict[str, Any]:
    """Return the optima, and the changes from the first setting to the last. Raises `ConfigError` if an optimum is at
    an edge of the grid.
    """
    found: dict[str, Any] = {"optima": {one.name: plain_optimum(optimum(one)) for one in curves}}
    if curves[0].scale != curves[-1].scale:
        found["drift_octaves"] = asdict(drift(curves[0], curves[-1]))
        found["penalty_nats"] = asdict(penalty(curves[0], curves[-1]))
        found["exponents"] = {size: asdict(one) for size, one in exponents(curves).items()}
        found["foretold"] = predicted_optimum(curves)
    found["losses"] = {
        one.name: {f"{2**rate:g}": losses for rate, losses in zip(one.log2_lrs, one.losses.tolist(), strict=True)}
        for one in curves
    }
    return found


def _say(rules: str, found: Mapping[str, Any], seeds: int) -> None:
    def interval(one: Mapping[str, float]) -> str:
        return f"[{one['low']:+.3f}, {one['high']:+.3f}]" if seeds > 1 else "(one seed: no interval)"

    for name, one in found["optima"].items():
        place = one["log2_lr"]
        shown = f"2^{place['value']:+.3f} {interval(place)} = {one['lr']:.3g}"
        print(f"fit: {rules}, {name}: best {shown}, loss {one['loss']['value']:.4f}")
    labels = {
        "drift_octaves": "the best rate moves, in octaves",
        "penalty_nats": "keeping the best rate of the first costs, in nats",
    }
    for key, label in labels.items():
        if key in found:
            print(f"fit: {rules}: from first to last, {label}: {found[key]['value']:+.3f} {interval(found[key])}")
    for size, one in found.get("exponents", {}).items():
        print(f"fit: {rules}: best rate ~ {size}^{one['value']:+.3f} {interval(one)}")
    prediction = found.get("foretold")
    if prediction is not None:
        verdict = "" if abs(prediction["octaves"]) <= TRUSTED else ": do not extrapolate"
        print(
            f"fit: {rules}: the others predict 2^{prediction['predicted']:+.3f} for {prediction['held_out']}, measured "
            f"2^{prediction['swept']:+.3f}, {prediction['octaves']:+.3f} octaves apart{verdict}"
        )


def _write_base(roots: Sequence[Path], members: Mapping[str, Member], found: Mapping[str, Any], out: Path) -> None:
    """Write base.yaml: the first (smallest) setting with its best rate."""
    name, first = next(iter(members.items()))
    base, best = as_base(first.run), found["optima"][name]
    provenance: dict[str, Any] = {
        "sweep": [str(root) for root in roots],
        "code": sources_digest(),
        "setting": name,
        "runs": sum(one.curve.losses.size for one in members.values()),
        "log2_lr": best["log2_lr"],
        "loss": best["loss"],
    }
    provenance |= {key: found[key] for key in ("exponents", "foretold") if found.get(key)}
    hparam = replace(base.hparam, provenance=provenance, **_powers(first.run, found.get("exponents", {})))
    optimizer = base.optimizer
    lr, muon = float(f"{best['lr']:.4g}"), optimizer.muon
    if muon.lr is not None:
        muon = replace(muon, lr=float(f"{muon.lr * lr / optimizer.lr:.4g}"))
    content = {
        "optimizer": plain(replace(optimizer, lr=lr, muon=muon)),
        "hparam": plain(hparam),
        "model": {"init": plain(base.model.init)},
    }
    head = "# @package _global_\n# Written by leviathan metap fit: the best of a sweep at this size.\n"
    write_text(out / "base.yaml", head + yaml.safe_dump(content, sort_keys=False))


def _powers(run: TrainConfig, fitted: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the exponents of batch and tokens whose intervals are narrow. If the runs had a base, their rates were
    already scaled with the assumed exponent, so the fitted one is added to it.
    """
    found = {}
    for size, key in FITTED.items():
        if size not in fitted:
            continue
        one, sign = fitted[size], -1 if size == "tokens" else 1
        power = sign * one["value"] + (getattr(run.hparam, key) if run.hparam.base is not None else 0.0)
        width = max(one["high"] - one["value"], one["value"] - one["low"])
        if width > WIDEST or not (0 if size == "batch" else -1) <= power <= 1:
            print(f"fit: hparam.{key}={power:.3f} ± {width:.3f} is not used; it stays {getattr(run.hparam, key):g}")
            continue
        found[key] = float(f"{power:.4g}")
    return found
