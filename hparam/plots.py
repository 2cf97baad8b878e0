"""Pictures of a coordinate check and of a sweep, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.errors import ConfigError
from hparam.coordinate_check import AxisResult
from hparam.fit import Curve

COLOURS = {"metap": "#0072B2", "standard": "#D55E00"}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def draw_check(results: Sequence[AxisResult]) -> bytes:
    """A row of panels for each axis, one for each quantity; both parametrizations with their slopes."""
    quantities = list(results[0].values["metap"])
    figure, panels = _figure(len(results), len(quantities), 2.6 * len(quantities), 2.5 * len(results))
    for row, result in zip(panels, results, strict=True):
        for panel, quantity in zip(row, quantities, strict=True):
            for rules, colour in COLOURS.items():
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
        row[0].set_ylabel(f"{result.axis.value}\nchange, root mean square", fontsize=8)
    return _png(figure)


def _span(panel: Any, values: Sequence[float], octaves: float = 3.0) -> None:
    """At least so many octaves: what hardly changes shall look so."""
    logs = np.log2([value for value in values if value > 0] or [1.0])
    middle, half = (logs.max() + logs.min()) / 2, max(logs.max() - logs.min(), octaves) / 2 + 0.3
    panel.set_ylim(2 ** (middle - half), 2 ** (middle + half))


def draw_sweep(by_rules: Mapping[str, Sequence[Curve]]) -> bytes:
    """Loss against learning rate, a panel for each parametrization, a line for each setting, minima marked."""
    figure, panels = _figure(1, len(by_rules), 5.2 * len(by_rules), 4)
    finite = [one.losses[np.isfinite(one.losses)] for curves in by_rules.values() for one in curves]
    lowest = min(float(losses.min()) for losses in finite)
    best = [float(one.mean(range(one.losses.shape[1])).min()) for curves in by_rules.values() for one in curves]
    highest = max(float(losses.max()) for losses in finite)
    top = min(max(best) + 4 * max(max(best) - lowest, 0.05), highest + 0.05)
    for panel, (rules, curves) in zip(panels[0], by_rules.items(), strict=True):
        for one, colour in zip(curves, SERIES * len(curves), strict=False):
            mean = one.losses.mean(1)
            panel.plot(one.log2_lrs, mean, "o-", color=colour, label=one.name, markersize=4)
            panel.fill_between(
                one.log2_lrs, one.losses.min(1), one.losses.max(1), color=colour, alpha=0.15, linewidth=0
            )
            try:
                panel.plot(*one.vertex(range(one.losses.shape[1])), "*", color=colour, markersize=13)
            except ConfigError:
                continue  # no minimum to mark: the fit says so
        panel.set_ylim(lowest - 0.05 * (top - lowest), top)  # room for the stars
        panel.set_xlabel("log2 of the learning rate")
        panel.set_title(rules, fontsize=10)
        panel.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("held-out loss, nats per token")
    return _png(figure)


def draw_optima(curves: Sequence[Curve], size: str) -> bytes:
    """The best learning rate against a size of the run, with intervals over seeds."""
    from hparam.fit import optimum

    figure, panels = _figure(1, 1, 5, 3.6)
    panel = panels[0][0]
    places = [getattr(one.scale, size) for one in curves]
    found = [optimum(one).log2_lr for one in curves]
    below, above = (
        [abs(one.value - edge) for one, edge in zip(found, edges, strict=True)]
        for edges in ([one.low for one in found], [one.high for one in found])
    )
    panel.errorbar(places, [one.value for one in found], [below, above], fmt="o", capsize=4, color=SERIES[0])
    panel.set_xscale("log", base=2)
    panel.set_xlabel(size)
    panel.set_ylabel("log2 of the best learning rate")
    return _png(figure)
