"""Fit the planner's constants: python -m bench.plan.fit FOLDER [time|memory].

FOLDER holds the published tables. Only the sources of split.json are fitted. Each constant starts at its value from the
literature and is drawn back to it, so that one which the rows do not determine keeps it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from core.files import write_json
from launch.plan.calibration import FILE, Calibration, default_calibration
from launch.plan.memory import GIB, peak_bytes, stage_memories
from launch.plan.pipeline import estimate_pipeline
from launch.plan.readers import open_table
from launch.plan.readers.common import Measured
from launch.plan.step_time import step_time

SPLIT = json.loads(Path(__file__).with_name("split.json").read_text())
PRIOR = 0.35
"""Standard deviation of the logarithm of a constant around its first value."""
NOISE = 0.10
"""Standard deviation of the logarithm of a measured time, beyond which a row counts less."""
NFEV = 40
SWEEP_STEP = 4
"""Interval between the rows of the sweep that are fitted, for speed."""

Numbers = np.ndarray
MEMORY = ("imbalance", "base_mib", "nanotron_", "usable", "all_to_all_")


@dataclass(frozen=True)
class Fit:
    """Rows with their weights, and the constants that may move."""

    rows: list[Measured]
    weights: Numbers
    outliers: Numbers
    """Rows whose source has gross outliers."""
    names: list[str]
    predict: Callable[[Measured, Calibration], float]
    measured: Callable[[Measured], float]

    def run(self, start: Calibration) -> Calibration:
        first = np.log([max(getattr(start, name), 1e-9) for name in self.names])
        prior = np.log([max(getattr(Calibration(), name), 1e-9) for name in self.names])

        def residuals(moved: Numbers) -> Numbers:
            logs = first + moved - 1
            calibration = self.at(start, logs)
            errors = [np.log(self.predict(row, calibration) / self.measured(row)) for row in self.rows]
            scaled = np.array(errors) / NOISE
            mild = np.sqrt(2 * (np.sqrt(1 + scaled**2) - 1))
            strong = np.sqrt(np.log1p(scaled**2))  # trials on sick nodes are several times slower than their twins
            robust = np.sign(scaled) * np.where(self.outliers, strong, mild)
            return np.concatenate([self.weights * robust, (logs - prior) / PRIOR])

        ones = np.ones(len(first))  # moves around 1, since steps of derivatives are relative
        found = least_squares(residuals, ones, max_nfev=NFEV, diff_step=1e-3, bounds=(ones - 3, ones + 3))
        final = self.at(start, first + found.x - 1)
        rounded = {name: float(f"{getattr(final, name):.4g}") for name in self.names}
        return dataclasses.replace(final, **rounded)

    def at(self, start: Calibration, logs: Numbers) -> Calibration:
        changed = {name: float(np.exp(log)) for name, log in zip(self.names, logs, strict=True)}
        shares = ("product_ampere", "product_hopper", "product_blackwell", "attention_", "stream", "nvlink", "network")
        for name in changed:
            if (name.startswith(shares) or name.endswith("_exposed")) and not name.endswith("_s"):
                changed[name] = min(changed[name], 1.0)
        return dataclasses.replace(start, **changed)


def rows_to_fit(folder: Path) -> dict[str, list[Measured]]:
    """Return the rows of the sources that may be fitted, by table."""
    runs = [row for row in open_table(folder / "runs.csv").rows if row.source in SPLIT["runs"]]
    simumax = [row for row in open_table(folder / "simumax_b200.csv").rows if row.job.shapes.experts is None]
    sizes = SPLIT["nanotron_hidden_sizes"]
    sweep = [row for row in open_table(folder / "nanotron_h100_sweep.csv").rows if row.job.shapes.hidden in sizes]
    peaks = open_table(folder / "megatron_peak_memory.csv").rows
    gpus = tuple(name.upper() for name in SPLIT["megatron_gpus"])
    return {
        "runs": runs,
        "simumax": simumax,
        "nanotron": sweep,
        "megatron": [row for row in peaks if row.job.gpu.name.startswith(gpus)],
    }


def time_fit(tables: dict[str, list[Measured]]) -> Fit:
    """Weigh rows so that several releases of one recipe, or the many rows of a sweep, count as a few."""
    runs = [row for row in tables["runs"] + tables["simumax"] if row.step_s]
    measured = [row for row in tables["nanotron"] if row.step_s]
    sweep = [row for at, row in enumerate(measured) if at % SWEEP_STEP == 0 or row.job.axes.ranks > 256]
    recipes = Counter(_recipe(row) for row in runs)
    weights = [recipes[_recipe(row)] ** -0.5 for row in runs] + [0.5] * len(sweep)
    names = [
        one.name
        for one in dataclasses.fields(Calibration)
        if not one.name.startswith(MEMORY) or one.name in ("nanotron_send_s", "nanotron_sharded", "nanotron_dp_hidden")
    ]
    outliers = np.array([False] * len(runs) + [True] * len(sweep))
    return Fit(runs + sweep, np.array(weights), outliers, names, _predicted_seconds, _seconds)


def memory_fit(tables: dict[str, list[Measured]]) -> Fit:
    rows = [row for row in tables["megatron"] if row.memory_bytes]
    outliers = np.full(len(rows), True)
    return Fit(rows, np.ones(len(rows)), outliers, ["imbalance", "base_mib"], _last_peak, _bytes)


def reservation_fit(tables: dict[str, list[Measured]]) -> Fit:
    """Fit what nanotron's layers keep to the reservations of the trials that ran."""
    rows = [row for row in tables["nanotron"] if row.reserved_bytes]
    names = [one.name for one in dataclasses.fields(Calibration) if re.fullmatch(r"nanotron_\w+_bytes", one.name)]
    outliers = np.full(len(rows), False)
    return Fit(rows, np.ones(len(rows)), outliers, names, _first_peak, _reserved)


def usable_share(tables: dict[str, list[Measured]], calibration: Calibration) -> float:
    """Return the share of a GPU's memory above which trials most often ran out of it."""
    shares, fits = [], []
    for row in tables["nanotron"]:
        if row.fits is not None:
            shares.append(peak_bytes(row.job, calibration) / (row.job.gpu.memory_gib * GIB))
            fits.append(row.fits)
    found, truth = np.array(shares), np.array(fits)
    limits = np.arange(0.80, 1.0, 0.01)
    scores = [np.mean(found[truth] <= limit) + np.mean(found[~truth] > limit) for limit in limits]
    best = np.flatnonzero(np.array(scores) >= max(scores) - 2e-3)
    return round(float(limits[best].mean()), 3)


def _last_peak(row: Measured, calibration: Calibration) -> float:
    return stage_memories(row.job, calibration)[-1].peak


def _first_peak(row: Measured, calibration: Calibration) -> float:
    return stage_memories(row.job, calibration)[0].peak


def _recipe(row: Measured) -> tuple[object, ...]:
    job = row.job
    return job.shapes, job.gpu.name, job.axes, job.precision


def _predicted_seconds(row: Measured, calibration: Calibration) -> float:
    return step_time(row.job, calibration, estimate_pipeline).total


def _seconds(row: Measured) -> float:
    assert row.step_s is not None
    return row.step_s


def _bytes(row: Measured) -> float:
    assert row.memory_bytes is not None
    return row.memory_bytes


def _reserved(row: Measured) -> float:
    assert row.reserved_bytes is not None
    return row.reserved_bytes


def main(arguments: Sequence[str]) -> None:
    folder, what = Path(arguments[0]), arguments[1:] or ["memory", "time"]
    tables = rows_to_fit(folder)
    calibration = default_calibration()
    if "memory" in what:
        calibration = memory_fit(tables).run(calibration)
        calibration = reservation_fit(tables).run(calibration)
        calibration = dataclasses.replace(calibration, usable=usable_share(tables, calibration))
    if "time" in what:
        calibration = time_fit(tables).run(calibration)
    stored = {"fitted_on": SPLIT, "constants": dataclasses.asdict(calibration)}
    write_json(FILE, stored)
    _report(tables, calibration)
    first = Calibration()
    for one in dataclasses.fields(Calibration):
        print(f"{one.name:<26} {getattr(first, one.name):>10.4g} {getattr(calibration, one.name):>10.4g}")


def _report(tables: dict[str, list[Measured]], calibration: Calibration) -> None:
    for name, rows in tables.items():
        errors = [abs(_predicted_seconds(row, calibration) / row.step_s - 1) for row in rows if row.step_s]
        if name != "megatron":
            print(f"fitted {name}: median {np.median(errors):.3f} mean {np.mean(errors):.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
