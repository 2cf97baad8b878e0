"""Draw plots of a coordinate check and of a sweep, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.errors import ConfigError
from core.plotting import COLOURS, cycle, figure, png
from hparam.coordinate_check import AxisResult
from hparam.fit import Curve, optimum


def draw_check(results: Sequence[AxisResult]) -> bytes:
    """Draw a row of panels for each `SizeAxis` (such as width) and, in the row, a panel per quantity. Each panel shows
    both parametrizations and their slopes.
    """
    quantities = list(results[0].values["metap"])
    columns = len(quantities)
    with figure(2.6 * columns, 2.5 * len(results), len(results), columns) as (made, panels):
        for number, panel in enumerate(panels):
            result, quantity = results[number // columns], quantities[number % columns]
            for rules, colour in zip(("metap", "standard"), COLOURS, strict=False):
                values = result.values[rules].get(quantity)
                if values is None:
                    continue
                label = f"{rules} {result.slopes[rules][quantity]:+.2f}"
                panel.plot(result.factors, values, "o-", color=colour, label=label, markersize=4)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            _span(panel, [value for by in result.values.values() for value in by.get(quantity, [])])
            panel.set_xticks(result.factors, [f"x{factor}" for factor in result.factors])
            panel.legend(frameon=False, fontsize=7)
            panel.set_title(quantity, fontsize=9)
            panel.tick_params(labelsize=7)
            if number % columns == 0:
                panel.set_ylabel(f"{result.axis.value}\nchange, root mean square", fontsize=8)
        return png(made)


def _span(panel: Any, values: Sequence[float], octaves: float = 3.0) -> None:
    """Make the y axis span at least `octaves` octaves, so that a small change looks small."""
    logs = np.log2([value for value in values if value > 0] or [1.0])
    middle, half = (logs.max() + logs.min()) / 2, max(logs.max() - logs.min(), octaves) / 2 + 0.3
    panel.set_ylim(2 ** (middle - half), 2 ** (middle + half))


def draw_sweep(by_rules: Mapping[str, Sequence[Curve]]) -> bytes:
    """Draw loss against learning rate: a panel per parametrization, a line per setting, and a star at its optimum."""
    curves = [one for some in by_rules.values() for one in some]
    finite = [one.losses[np.isfinite(one.losses)] for one in curves]
    lowest, highest = min(float(losses.min()) for losses in finite), max(float(losses.max()) for losses in finite)
    worst_best = max(float(one.mean(one.seeds).min()) for one in curves)
    top = min(worst_best + 4 * max(worst_best - lowest, 0.05), highest + 0.05)
    with figure(5.2 * len(by_rules), 4, 1, len(by_rules)) as (made, panels):
        for panel, (rules, some) in zip(panels, by_rules.items(), strict=True):
            for one, colour in zip(some, cycle(len(some), COLOURS[:7]), strict=True):
                panel.plot(one.log2_lrs, one.losses.mean(1), "o-", color=colour, label=one.name, markersize=4)
                low, high = one.losses.min(1), one.losses.max(1)
                panel.fill_between(one.log2_lrs, low, high, color=colour, alpha=0.15, linewidth=0)
                try:
                    panel.plot(*one.vertex(one.seeds), "*", color=colour, markersize=13)
                except ConfigError:
                    continue  # no star: the fit reports that the optimum is missing
            panel.set_ylim(lowest - 0.05 * (top - lowest), top)  # space for the stars
            panel.set_xlabel("log2 of the learning rate")
            panel.set_title(rules, fontsize=10)
            panel.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel("held-out loss, nats per token")
        return png(made)


def draw_optima(curves: Sequence[Curve], size: str) -> bytes:
    """Draw the best learning rate against `size`, a field of `Curve.scale`, with intervals over seeds."""
    found = [optimum(one).log2_lr for one in curves]
    values, low, high = ([getattr(one, name) for one in found] for name in ("value", "low", "high"))
    with figure(5, 3.6) as (made, [panel]):
        errors = [np.abs(np.subtract(values, low)), np.abs(np.subtract(high, values))]
        places = [getattr(one.scale, size) for one in curves]
        panel.errorbar(places, values, errors, fmt="o", capsize=4, color=COLOURS[0])
        panel.set_xscale("log", base=2)
        panel.set_xlabel(size)
        panel.set_ylabel("log2 of the best learning rate")
        return png(made)
