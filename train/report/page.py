"""Write the report of one run, or of several side by side, as one HTML page that contains all plots."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from core.config import differences, plain
from core.errors import ConfigError
from core.files import write_bytes, write_text
from core.html import render
from core.overrides import quoted
from data.filter.audit.outputs import AUDIT_PAGE
from train.metap.hyperparameters import without_derived
from train.report import modalities, retrieval
from train.report.plots import Picture, draw
from train.report.run import RunData, units

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")


_UNCOMPARED = ("run.name", "run.root", "launch")
"""Keys that the table of differences leaves out: they say what a run is called and where it ran."""
_MISSING = object()


def write_report(directories: Sequence[Path], out: Path, refresh: int | None = None) -> bool:
    """Write the report of the runs to `out`; return whether all runs have ended.

    `refresh`: seconds after which a browser loads the page again, as long as a run has not ended. The report in the
    directory of a single run comes with `plots/`.
    """
    if out.is_dir():
        raise ConfigError("out", str(out), "is a folder; name a file", [out / "page.html"])
    runs = [RunData(directory) for directory in directories]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.directory)
    ended = all(run.ended for run in runs)
    pictures = draw(runs)
    if len(runs) == 1 and out.parent == runs[0].directory:
        (out.parent / "plots").mkdir(exist_ok=True)
        for picture in pictures:
            write_bytes(out.parent / "plots" / f"{picture.name}.png", picture.png)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, _page(runs, pictures, out.parent, None if ended else refresh))
    return ended


def repeat_command(run: RunData) -> str:
    """Return a shell command that repeats the run under another name, from any folder."""
    name = f"{run.directory.resolve().name}-again"
    value = name if re.fullmatch(r"[A-Za-z][\w.-]*", name) else quoted(name)
    path = (run.directory / "config.yaml").resolve()
    return shlex.join(["leviathan", "train", "--config", str(path), f"run.name={value}"])


def _page(runs: Sequence[RunData], pictures: Sequence[Picture], folder: Path, refresh: int | None) -> str:
    """Render the page. `folder`: the folder of the page, to which links are relative."""
    described = [
        {
            "name": run.name,
            "warnings": list(run.warnings()),
            "audit": os.path.relpath(audit, folder) if (audit := run.directory / AUDIT_PAGE).exists() else None,
            "examples": run.examples,
            "recovery": run.recovery,
            "command": repeat_command(run),
            "config": yaml.safe_dump(plain(run.config), sort_keys=False),
        }
        for run in runs
    ]
    return render(
        _TEMPLATE,
        title=", ".join(run.name for run in runs),
        when=time.strftime("%Y-%m-%d %H:%M"),
        runs=described,
        summary=_summary(runs),
        pictures=pictures,
        differences=_differences(runs),
        refresh=refresh,
    )


_PLANNED = (
    ("tokens per second, planned", "tokens_per_second", 1.0, ",.0f"),
    ("peak memory, planned, GB", "memory_bytes", 1e9, ".2f"),
)
"""Rows of the planner's prediction, beside what was measured."""


def _summary(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """Return, by label, a text with the value of each run, "-" for a run without the value."""
    held_out = [run.summary.get("heldout") or {} for run in runs]
    sources = [one.get("sources", {}) for one in held_out]
    memory = [run.figure("peak_memory_bytes") for run in runs]
    rows: list[tuple[str, list[Any], str]] = [
        ("steps", [run.steps[-1] for run in runs], ",d"),
        ("tokens", [run.lines[-1]["tokens"] for run in runs], ",d"),
        ("training loss, last logged", [run.lines[-1]["loss"] for run in runs], ".4f"),
        (f"held-out loss, {units(runs)}", [run.figure("heldout_loss") for run in runs], ".4f"),
        ("held-out bits per byte", [one.get("bits_per_byte") for one in held_out], ".4f"),
        ("bigram model", [run.figure("bigram_loss") for run in runs], ".4f"),
        ("unigram model", [run.figure("unigram_loss") for run in runs], ".4f"),
        ("tokens per second", [run.figure("tokens_per_second") for run in runs], ",.0f"),
        ("peak memory, GB", [None if size is None else size / 1e9 for size in memory], ".2f"),
        ("parameters", [run.figure("total_parameters") for run in runs], ",d"),
        ("parameters active per token", [run.figure("active_parameters") for run in runs], ",d"),
        ("ranks", [run.figure("world_size") for run in runs], ",d"),
    ]
    for label, key, unit, form in _PLANNED:
        planned = [run.prediction.get(key) for run in runs]
        if any(planned):
            rows.append((label, [None if value is None else value / unit for value in planned], form))
    for source in {source: None for one in sources for source in one}:
        rows.append((f"held-out loss: {source}", [one.get(source, {}).get("loss") for one in sources], ".4f"))
    rows += [*modalities.summary(runs), *retrieval.rows(runs)]
    found = {label: [_shown(value, form) for value in values] for label, values, form in rows}
    for label in {label: None for run in runs for label in run.examinations}:
        scores = [run.examinations.get(label) for run in runs]
        found[f"examination {label}, 95% interval"] = [str(one[-1]) if one else "-" for one in scores]
    return found


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(round(value) if form.endswith("d") else value, form)


def _differences(runs: Sequence[RunData]) -> dict[str, dict[str, list[str]]]:
    """Return the configuration keys whose values differ between the runs, each with its value in every run.

    `given`: those of the values that the user set. `derived`: the others, which follow from them.
    """
    given = _compared([plain(without_derived(run.config)) for run in runs])
    derived = _compared([plain(run.config) for run in runs])
    return {"given": given, "derived": {key: values for key, values in derived.items() if key not in given}}


def _compared(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    first, *others = configs
    keys = {key: None for other in others for key in differences(first, other)}
    kept = (key for key in keys if not any(key == one or key.startswith(f"{one}.") for one in _UNCOMPARED))
    return {key: [_value(config, key) for config in configs] for key in kept}


def _value(config: dict[str, Any], key: str) -> str:
    """Return the value of a dotted key as YAML has it, "-" if the configuration lacks it."""
    value = _found(config, key)
    return "-" if value is _MISSING else value if isinstance(value, str) else json.dumps(value, default=str)


def _found(tree: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key. The names of sources may contain dots."""
    if key in tree:
        return tree[key]
    within = ((sub, key.removeprefix(f"{name}.")) for name, sub in tree.items() if key.startswith(f"{name}."))
    values = (_found(sub, rest) for sub, rest in within if isinstance(sub, dict))
    return next((value for value in values if value is not _MISSING), _MISSING)
