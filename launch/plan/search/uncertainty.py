"""Error bars: how wrong the planner was on the published rows that are most like a planned run.

The rows are those of sources that no constant was fitted to; `bench.plan.residuals` stores their errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("residuals.json")
NEAREST = 20
"""Rows whose errors make an interval."""
INSIDE = 0.8
"""Share of these rows' errors inside the interval."""
WIDER = 0.25
"""By how much an interval widens, relative to itself, per factor of two outside the range of the rows."""


@dataclass(frozen=True)
class RunTraits:
    """What decides which rows are near."""

    generation: str
    gpu: str
    is_moe: bool
    is_quantised: bool
    gpus: int
    parameters: float


@dataclass(frozen=True)
class Residual(RunTraits):
    """A validated row. Natural logarithms of measured over predicted; None: not measured."""

    time: float | None
    memory: float | None


@dataclass(frozen=True)
class ErrorBar:
    """Factors on a prediction between which `INSIDE` of the measurements of `rows` like rows lie. `outside`: in what
    the run is outside the range of all rows, in words.
    """

    low: float
    high: float
    rows: int
    outside: tuple[str, ...]

    @property
    def words(self) -> str:
        interval = f"{self.low - 1:+.0%} to {self.high - 1:+.0%}"
        source = f"{INSIDE:.0%} of the {self.rows} most similar held-out published runs"
        wider = f"; widened, outside the validated range: {', '.join(self.outside)}" if self.outside else ""
        return f"{interval} ({source}{wider})"


@cache
def stored_residuals() -> tuple[Residual, ...]:
    return tuple(Residual(*row) for row in json.loads(FILE.read_text())["rows"])


def error_bar(run: RunTraits, what: str, residuals: Iterable[Residual] | None = None) -> ErrorBar:
    """Return the error bar of a prediction. `what`: "time" or "memory"."""
    rows = [row for row in (residuals or stored_residuals()) if getattr(row, what) is not None]
    near = sorted(rows, key=lambda row: _distance(run, row))[:NEAREST]
    low, high = np.quantile([getattr(row, what) for row in near], [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
    low, high = min(low, 0.0), max(high, 0.0)  # contain the prediction even if all errors have one sign
    octaves, outside = _outside(run, rows)
    factor = 1 + WIDER * octaves
    return ErrorBar(math.exp(low * factor), math.exp(high * factor), len(near), tuple(outside))


def _distance(run: RunTraits, row: RunTraits) -> float:
    """Return how unlike two runs are. A kind of GPU, of model or of precision weighs like some factors of two."""
    kinds = 4.0 * (run.generation != row.generation) + (run.gpu != row.gpu)
    kinds += 3.0 * (run.is_moe != row.is_moe) + 2.0 * (run.is_quantised != row.is_quantised)
    return kinds + abs(math.log2(run.gpus / row.gpus)) + abs(math.log2(run.parameters / row.parameters))


def _outside(run: RunTraits, rows: list[Residual]) -> tuple[float, list[str]]:
    """Return by how many factors of two a run is outside the range of the rows, and in what. An unseen kind counts as
    two.
    """
    octaves, found = 0.0, []
    for name, value, values in (
        ("GPUs", run.gpus, [row.gpus for row in rows]),
        ("parameters", run.parameters, [row.parameters for row in rows]),
    ):
        beyond = max(0.0, math.log2(value / max(values)), math.log2(min(values) / value))
        if beyond:
            octaves += beyond
            found.append(f"{short(value)} {name}, not {short(min(values))} to {short(max(values))}")
    if run.gpu not in {row.gpu for row in rows}:
        octaves += 2
        found.append(f"no row is of {run.gpu}")
    if not any((row.is_moe, row.is_quantised) == (run.is_moe, run.is_quantised) for row in rows):
        octaves += 2
        kind = ("FP8 " if run.is_quantised else "bf16 ") + ("MoE" if run.is_moe else "dense")
        found.append(f"no row of a {kind} model")
    return octaves, found


def short(number: float) -> str:
    """Return a count for people: 950, 13.3B, 2.0T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:,.0f}"
