"""The verb `report`: what people would rather look at than read, one page without anything outside it.

For one run or several side by side. Everything comes from the runs' directories; an unfinished run is drawn as far as
it came.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import yaml

from core.config import differences, load, plain
from core.errors import ConfigError, LeviathanError
from core.files import read_json, write_bytes, write_text
from core.html import data_url, page
from data.filter.audit.outputs import AUDIT_PAGE
from model.config import FeedForward
from train.config import TrainConfig, phases
from train.metap.hyperparameters import without_derived
from train.report.plots import WIDE, draw
from train.run_directory import load_config, read_lines

PAGE = "report.html"
SPIKE = 1.5
"""Nats by which a logged loss must exceed the median of the ten before it to be called a spike."""
UNEVEN = 4.0
"""Load of the busiest expert over the mean, at the end of a run, that is worth a warning."""
_TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "throughput": "Throughput",
    "memory": "Memory",
    "expert_load": "Expert load",
    "router_entropy": "Router entropy",
    "load_entropy": "Evenness of the load",
    "dead_experts": "Idle experts",
    "router_z": "Router logits",
}


class RunData:
    """What a run's directory says. Raises `ConfigError` where it is none or has nothing to draw yet."""

    def __init__(self, directory: Path) -> None:
        try:
            self.config: TrainConfig = load_config(directory)
        except ConfigError as error:
            raise ConfigError("runs", str(directory), error.reason) from None
        self.directory, self.name = directory, directory.resolve().name
        metrics = directory / "metrics.jsonl"
        logged = list(read_lines(metrics)) if metrics.exists() else []
        self.lines = [line for line in logged if "loss" in line]
        self.held_out = [line for line in logged if "heldout_loss" in line]
        if not self.lines:
            reason = f"has logged no step yet (a line comes every {self.config.logging.every} steps)"
            raise ConfigError("runs", str(directory), reason)
        summary = directory / "summary.json"
        self.summary: dict[str, Any] | None = read_json(summary) if summary.exists() else None
        log = directory / "log.txt"
        self.log = log.read_text(errors="replace").splitlines() if log.exists() else []

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    @property
    def total_steps(self) -> int:
        return phases(self.config)[-1].stop

    def values(self, key: str) -> list[float]:
        return [line[key] for line in self.lines]

    @cached_property
    def layers(self) -> list[int]:
        """Indices of the mixture layers whose load was logged."""
        if "expert_load" not in self.lines[-1]:
            return []
        blocks = enumerate(self.config.model.blocks)
        return [index for index, layer in blocks if layer.feed_forward is FeedForward.moe]

    def warnings(self) -> Iterator[str]:
        """What someone should look at, each from a figure."""
        last, summary = self.lines[-1], self.summary or {}
        if last["step"] < self.total_steps:
            yield f"The run stands at step {last['step']:,} of {self.total_steps:,}."
        held_out, bigram = summary.get("heldout_loss"), summary.get("bigram_loss")
        if held_out is not None and bigram is not None and held_out >= bigram:
            yield f"The held-out loss {held_out:.3f} is not below the bigram model's {bigram:.3f}."
        for index, load_ in zip(self.layers, last.get("expert_load", []), strict=False):
            if load_["dead"]:
                yield f"Layer {index}: {load_['dead']} experts got no token in the last logged step."
            elif load_["max_over_mean"] > UNEVEN:
                yield f"Layer {index}: the busiest expert gets {load_['max_over_mean']:.1f} times the mean."
        for place in range(10, len(self.lines)):
            before = sorted(line["loss"] for line in self.lines[place - 10 : place])
            now = self.lines[place]
            if now["loss"] > before[5] + SPIKE:
                yield f"The loss jumped to {now['loss']:.2f} at step {now['step']:,}, from about {before[5]:.2f}."
        for text in ("could not save", "is damaged", "is not recorded"):
            found = [line for line in self.log if text in line]
            if found:
                yield f"{len(found)} times in log.txt: {found[-1].split(' ', 2)[-1]}"


def write_report(directories: Sequence[Path], out: Path) -> None:
    """Draw the runs into one page at `out`; a single run's pictures are left in its `plots/`, too."""
    runs = [RunData(directory) for directory in directories]
    pictures = draw(runs)
    if len(runs) == 1:
        (runs[0].directory / "plots").mkdir(exist_ok=True)
        for name, content in pictures.items():
            write_bytes(runs[0].directory / "plots" / f"{name}.png", content)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, _page(runs, pictures, out.parent))


def repeat_command(config: TrainConfig) -> str | None:
    """A command whose composed configuration is this one but for its place; None where overrides cannot say it."""
    config, usual = without_derived(config), load("train", TrainConfig, [])
    overrides = (
        [] if config.hparam == usual.hparam else ["hparam=none"]
    )  # entries of the usual base could not be dropped
    base = plain(load("train", TrainConfig, overrides))
    for key, (_, after) in differences(base, plain(config)).items():
        if key.startswith(("launch", "run.root", "run.name")):
            continue
        value = yaml.safe_dump(after, default_flow_style=True, width=10**9).removesuffix("\n...\n").strip()
        if isinstance(after, str):
            value = f"'{after}'"
        parent, _, name = key.rpartition(".")
        overrides.append(f"{'' if name in (_at(base, parent) or base) else '+'}{key}={value}")
    try:
        again = load("train", TrainConfig, overrides)
    except LeviathanError:
        return None
    same = {**plain(config), "run": plain(again)["run"], "launch": plain(again)["launch"]}
    same["run"] |= {"seed": config.run.seed}
    if differences(plain(again), same):
        return None
    return " ".join(["leviathan train", *(f'"{o}"' if set(o) & set(" '{[*") else o for o in overrides)])


def _page(runs: Sequence[RunData], pictures: dict[str, bytes], folder: Path) -> str:
    """`folder`: where the page will lie."""
    title = ", ".join(run.name for run in runs)
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=when>{time.strftime('%Y-%m-%d %H:%M')}</p>"]
    for run in runs:
        found = list(run.warnings())
        if found:
            items = "".join(f"<li>{escape(text)}</li>" for text in found)
            parts.append(f"<div class=warning><b>{escape(run.name)}</b><ul>{items}</ul></div>")
    parts.append(_summary(runs))
    for run in runs:
        if (run.directory / AUDIT_PAGE).exists():
            audit = escape(os.path.relpath(run.directory / AUDIT_PAGE, folder))
            parts.append(
                f'<p><a href="{audit}">What the filter left out of the data of {escape(run.name)}, and why</a></p>'
            )
    figures = "".join(_figure(runs, name, content) for name, content in pictures.items())
    parts += [f"<div class=pictures>{figures}</div>", _configurations(runs)]
    return page(title, "\n".join(parts))


def _figure(runs: Sequence[RunData], name: str, content: bytes) -> str:
    stem, _, number = name.rpartition("_")
    kind = stem if number.isdigit() else name
    heading = escape(_TITLES[kind] + (f": {runs[int(number) - 1].name}" if number.isdigit() else ""))
    image = f'<img alt="{heading}" src="{data_url(content)}">'
    return f"<figure{' class=wide' if kind in WIDE else ''}><figcaption>{heading}</figcaption>{image}</figure>"


def _summary(runs: Sequence[RunData]) -> str:
    """A row per figure, a column per run; a dash where a run has none."""
    rows: list[tuple[str, list[str]]] = []

    def row(label: str, values: list[Any], form: str, factor: float = 1) -> None:
        shown = ["-" if value is None else format(value * factor, form) for value in values]
        rows.append((label, shown))

    def figures(key: str) -> list[Any]:
        return [(run.summary or {}).get(key, run.lines[-1].get(key)) for run in runs]

    row("steps", [run.steps[-1] for run in runs], ",d")
    row("tokens", [run.lines[-1]["tokens"] for run in runs], ",d")
    row("training loss, last logged", [run.lines[-1]["loss"] for run in runs], ".4f")
    row("held-out loss, nats per token", figures("heldout_loss"), ".4f")
    held_out = [(run.summary or {}).get("heldout") or {} for run in runs]
    row("held-out bits per byte", [found.get("bits_per_byte") for found in held_out], ".4f")
    row("bigram model", figures("bigram_loss"), ".4f")
    row("unigram model", figures("unigram_loss"), ".4f")
    row("tokens per second", figures("tokens_per_second"), ",.0f")
    row("peak memory, GB", figures("peak_memory_bytes"), ".2f", 1e-9)
    row("parameters", figures("total_parameters"), ",d")
    row("parameters active per token", figures("active_parameters"), ",d")
    row("ranks", figures("world_size"), ",d")
    for source in {source: None for found in held_out for source in found.get("sources", {})}:
        losses = [found.get("sources", {}).get(source, {}).get("loss") for found in held_out]
        row(f"held-out loss: {source}", losses, ".4f")
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><td>{escape(label)}</td>{''.join(f'<td class=n>{escape(v)}</td>' for v in values)}</tr>"
        for label, values in rows
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _configurations(runs: Sequence[RunData]) -> str:
    parts = []
    if len(runs) > 1:
        first = plain(runs[0].config)
        keys = {key: None for run in runs[1:] for key in differences(first, plain(run.config))}
        trees = [plain(run.config) for run in runs]
        body = "".join(
            f"<tr><td>{escape(key)}</td>{''.join(f'<td>{escape(str(_at(tree, key)))}</td>' for tree in trees)}</tr>"
            for key in keys
        )
        head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
        parts.append(f"<h2>Where the configurations differ</h2><table><tr><th></th>{head}</tr>{body}</table>")
    for run in runs:
        command = repeat_command(run.config)
        how = command or f"leviathan train, with the configuration of {run.directory / 'config.yaml'}"
        parts.append(f"<h2>To repeat {escape(run.name)}</h2><pre>{escape(how)}</pre>")
        text = yaml.safe_dump(plain(run.config), sort_keys=False)
        parts.append(
            f"<details><summary>Configuration of {escape(run.name)}</summary><pre>{escape(text)}</pre></details>"
        )
    return "\n".join(parts)


def _at(tree: dict[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
