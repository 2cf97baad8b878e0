"""Transfer the hyperparameters of a small base to the configuration of a larger target."""

from __future__ import annotations

import shlex
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

from core.config import build, load, plain
from core.errors import ConfigError, UnreadableFileError
from core.files import misfit, write_text
from core.package_guard import sources_digest
from core.yaml_file import read_yaml
from hparam.transfer import Resolved, spans
from train.config import TrainConfig
from train.metap.hyperparameters import as_base, derive, found_at, resolve, scale_of_run, without_derived
from train.run_directory import load_config

WRITTEN = ("model", "training", "schedule", "phases", "optimizer", "hparam", "precision", "evaluation", "checkpoint")
"""Sections that a transfer writes. `data` is omitted: sources in a file would be merged with the default ones."""
FROM_BASE = ("optimizer", "hparam")
"""Sections that the base gives to the target, besides `model.init`."""
_BASE: dict[str, Any] = {"optimizer": {}, "hparam": {"provenance?": {}}, "model": {"init": {}}}


def transfer(base: str, overrides: list[str], name: str, out: Path) -> int:
    """Write `experiment/NAME.yaml` for `leviathan train`, and `NAME.md` with a table of the values.

    `base`: a file that `metap fit` wrote or the directory of a run. `overrides`: overrides that describe the target.
    """
    target = load("train", TrainConfig, overrides)
    given = plain(without_derived(target))
    merged = {**given, "model": dict(given["model"])}
    read_base(Path(base).expanduser(), merged)
    for word in filter(_is_of_base, overrides):  # they take precedence over the base
        *parents, last = _key(word).split(".")
        reduce(getitem, parents, merged)[last] = reduce(getitem, [*parents, last], given)
    merged["hparam"]["provenance"] |= {"base": base, "target": list(overrides), "code": sources_digest()}
    found = resolve(build(TrainConfig, merged))
    if found.hparam.base is None:
        raise ConfigError("base", base, "has no hparam.base; name the directory of the run to use as a base")
    lines = table(found, derive(found))
    head = "# @package _global_\n# Written by leviathan metap transfer; `train` derives every value again.\n"
    path = out / "experiment" / f"{name}.yaml"
    sections = {key: plain(found)[key] for key in WRITTEN}
    write_text(path, head + yaml.safe_dump(sections, sort_keys=False))
    write_text(out / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    words = [f"hydra.searchpath=[file://{out.absolute()}]", f"experiment={name}"]
    words += [word for word in overrides if _key(word).partition(".")[0] not in (*WRITTEN, "experiment", "hydra")]
    print(f"\nwritten: {path}\nleviathan train {' '.join(map(shlex.quote, words))}")
    return 0


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")


def _is_of_base(word: str) -> bool:
    key = _key(word)
    if key == "hparam":  # this preset is what the target would use without a base
        return False
    return key.partition(".")[0] in FROM_BASE or key.startswith("model.init")


def read_base(path: Path, into: dict[str, Any]) -> None:
    """Replace `optimizer`, `hparam` and `model.init` in the plain configuration `into` by those of the base."""
    try:
        stored = plain(as_base(load_config(path))) if path.is_dir() else read_yaml(path)
        if problem := misfit(stored, _BASE):
            raise UnreadableFileError(problem)
        content, init = {key: stored[key] for key in FROM_BASE}, stored["model"]["init"]
    except OSError as error:
        raise ConfigError("base", str(path), f"cannot be read: {error.strerror}") from None
    except UnreadableFileError as error:
        reason = f"is not a base: it needs optimizer, hparam and model.init, as `metap fit` writes them ({error})"
        raise ConfigError("base", str(path), reason) from None
    into |= content
    into["model"]["init"] = init
    into["hparam"] = {"provenance": {}, **into["hparam"]}


def table(config: TrainConfig, found: Resolved) -> list[str]:
    """Return a Markdown table of every role's values at the base and at the target."""
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
    lines += ["", f"Multipliers: {factors}. beta2: {found.beta2:.6g}. Weight decay averages over: {tau}."]
    lines += [f"Rules: {config.hparam.rules.value}, table {found.digest}."]
    return [*lines, *(f"Warning: {line}." for line in found.warnings)]
