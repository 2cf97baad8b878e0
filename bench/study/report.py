"""Compare arms with the random half: paired differences of accuracy by difficulty, as tables, JSON and a picture.

An interval is that of Student's t over seeds, for the mean of the differences of runs with the same seed, which share
the pool, the held-out problems and the initial weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.study.arms import EVERYTHING, EXAM_EACH, HARD, JUDGE, LEARNED, RANDOM, Cell
from bench.study.tasks import DIFFICULTIES, EASY_STEPS, MAX_STEPS
from core.files import write_bytes, write_json, write_text
from core.plotting import figure, png

COLOURS = {HARD: "#D55E00", JUDGE: "#E69F00", LEARNED: "#0072B2", EVERYTHING: "#009E73"}
UNIFORM, OWN = "all steps", "like pool"
GROUPS = (*(f"{first}-{last}" for first, last in DIFFICULTIES), UNIFORM, OWN)
"""Numbers of steps, all of them equally weighted, and weighted as in the pool of the cell."""

Runs = Mapping[tuple[str, str, int], Mapping[str, Any]]


def weights_of(cell: Cell) -> NDArray[np.float64]:
    """Return the weight of each number of steps in each of `GROUPS`, [groups, steps]."""
    steps = np.arange(1, MAX_STEPS + 1)
    rows = [(steps >= first) & (steps <= last) for first, last in DIFFICULTIES]
    own = np.where(steps <= EASY_STEPS, cell.easy / EASY_STEPS, (1 - cell.easy) / (MAX_STEPS - EASY_STEPS))
    table = np.array([*rows, np.ones(MAX_STEPS), own], np.float64)
    return table / table.sum(1, keepdims=True)


def accuracies(row: Mapping[str, Any], cell: Cell) -> NDArray[np.float64]:
    """Return the accuracy of a run in each of `GROUPS`, the mean over families."""
    return weights_of(cell) @ (np.array(row["right"], np.float64).mean(0) / EXAM_EACH)


def compare(runs: Runs, cell: Cell) -> dict[str, Any] | None:
    """Return the comparison of a cell, over the seeds with all its arms. None: fewer than two seeds have them."""
    seeds = [seed for name, arm, seed in runs if name == cell.name and arm == RANDOM]
    seeds = sorted(seed for seed in seeds if all((cell.name, arm, seed) in runs for arm in cell.arms))
    if len(seeds) < 2:
        return None
    found = {arm: np.array([accuracies(runs[cell.name, arm, seed], cell) for seed in seeds]) for arm in cell.arms}
    areas = [[runs[cell.name, arm, seed]["area"] for seed in seeds] for arm in cell.arms if arm != EVERYTHING]
    return {
        "cell": cell.name,
        "easy": cell.easy,
        "trained": cell.trained,
        "epochs": cell.epochs,
        "size": cell.size,
        "seeds": seeds,
        "groups": GROUPS,
        "accuracy": {arm: one.mean(0).tolist() for arm, one in found.items()},
        "auc": dict(zip((arm for arm in cell.arms if arm != EVERYTHING), np.mean(areas, 1).tolist(), strict=True)),
        "differences": {arm: (one - found[RANDOM]).tolist() for arm, one in found.items() if arm != RANDOM},
        "interval": {arm: interval(one - found[RANDOM]) for arm, one in found.items() if arm != RANDOM},
    }


def interval(values_SG: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return the mean over seeds [S, G] and half the width of its 95% interval, for each group."""
    from scipy.stats import t

    count = len(values_SG)
    widths = t.ppf(0.975, count - 1) * values_SG.std(0, ddof=1) / math.sqrt(count)
    return list(zip(values_SG.mean(0).tolist(), widths.tolist(), strict=True))


def table(found: Iterable[Mapping[str, Any]]) -> str:
    """Return a Markdown table: accuracies of the random half in percent, and differences from it in points."""
    heads = ["size", "easy", "trained on", "epochs", "arm", *GROUPS]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for one in found:
        first = f"| {one['size']} | {one['easy']:.0%} | {one['trained']:,} | {one['epochs']} |"
        cells = [f"{100 * value:.1f}" for value in one["accuracy"][RANDOM]]
        lines.append(f"{first} {RANDOM} | {' | '.join(cells)} |")
        for arm, row in one["interval"].items():
            cells = [f"{100 * mean:+.1f} ± {100 * width:.1f}" for mean, width in row]
            lines.append(f"| | | | | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(runs: Runs, grid: Iterable[Cell], out: Path) -> str:
    """Write `differences.json`, `differences.md` and `differences.png` into `out`, and return the table."""
    found = [one for one in (compare(runs, cell) for cell in grid) if one is not None]
    shown = table(found)
    write_json(out / "differences.json", {"cells": found})
    write_text(out / "differences.md", shown + "\n")
    if found:
        write_bytes(out / "differences.png", _picture(found))
    return shown


def _picture(found: list[dict[str, Any]]) -> bytes:
    """Draw a panel for each cell; columns are mixes, rows the lengths of training."""
    mixes = sorted({one["easy"] for one in found})
    rows = sorted({(one["size"], one["epochs"], one["trained"]) for one in found})
    places = {(row, easy): number for number, (row, easy) in enumerate((row, easy) for row in rows for easy in mixes)}
    size = (4 * len(mixes), 2.7 * len(rows))
    with figure(*size, rows=len(rows), columns=len(mixes), sharex=True, sharey=True) as (made, axes):
        for panel in axes:
            panel.set_visible(False)
        for one in found:
            key = (one["size"], one["epochs"], one["trained"])
            panel = axes[places[key, one["easy"]]]
            panel.set_visible(True)
            _draw(panel, one)
        handles = {arm: _handle(arm) for arm in COLOURS if any(arm in one["interval"] for one in found)}
        made.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
        made.supylabel(f"accuracy minus that of the {RANDOM}, percentage points")
        made.supxlabel("steps of the held-out problems")
        return png(made)


def _handle(arm: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=COLOURS[arm], marker="o", linestyle="")


def _draw(panel: Any, one: dict[str, Any]) -> None:
    """Draw the mean and interval of each arm and group, and each seed as a small dot."""
    panel.axhline(0, color="#999999", linewidth=1)
    for number, (arm, row) in enumerate(one["interval"].items()):
        means, widths = (100 * np.array(values) for values in zip(*row, strict=True))
        places = np.arange(len(GROUPS)) + (number - (len(one["interval"]) - 1) / 2) * 0.22
        panel.errorbar(places, means, widths, fmt="o", markersize=5, capsize=3, color=COLOURS[arm])
        for values in one["differences"][arm]:
            panel.plot(places + 0.07, 100 * np.array(values), ".", markersize=3, color=COLOURS[arm], alpha=0.5)
    panel.set_xticks(range(len(GROUPS)), [name.replace(" ", "\n", 1) for name in GROUPS], fontsize=8)
    panel.set_ylim(-105, 105)
    often = "one epoch" if one["epochs"] == 1 else f"half: {one['epochs']} epochs"
    panel.set_title(f"{one['size']}, {one['easy']:.0%} easy, {one['trained']:,} problems, {often}", fontsize=9)
