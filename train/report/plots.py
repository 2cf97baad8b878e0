"""Draw the plots of a report, as PNG.

Each plot shows all runs, but a plot of MoE layers shows one run. Such plots of several runs have the same scale.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from core.plotting import cycle, figure, png
from train.report import examinations, modalities, retrieval
from train.report.run import RunData, units

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_CHARACTERS = 36
"""The label of a vertical axis is wrapped at this length, because a longer line would be cut off."""
_SMALL: dict[str, Any] = {"fontsize": 8, "frameon": False}


class Picture(NamedTuple):
    name: str
    title: str
    png: bytes
    wide: bool
    """Whether the plot has the full width of the page. Plots that are not wide are two in a row."""
    first: bool = False
    """Whether the plot begins a row, because it is of another kind than the plot before."""


class _Plot(NamedTuple):
    title: str
    draw: Callable[[Axes, Sequence[RunData]], None]
    wide: bool = False
    metric: str = "loss"
    """Skip the plot if no run has this metric."""


class _LayerPlot(NamedTuple):
    title: str
    draw: Callable[[Axes, RunData, tuple[float, float]], None]
    """Draw one run, on a scale from the first number to the second."""
    scale: Callable[[Sequence[RunData]], tuple[float, float]]
    """Return the scale on which all runs are drawn."""
    wide: bool = False
    modality: str | None = None
    """Omit runs without logged loads of its tokens; None: of any tokens."""


def draw(runs: Sequence[RunData]) -> list[Picture]:
    """Draw every plot for which the runs have data."""
    found = []
    for name, overview in _PLOTS.items():
        if any(run.has(overview.metric) for run in runs):
            found.append(_picture(name, overview.title, _bound(overview.draw, runs), overview.wide))
    for number, label in enumerate(examinations.labels(runs)):
        drawing = _bound(examinations.draw_scores, runs, label)
        found.append(_picture(f"examination_{number}", f"Examination {label}", drawing, wide=False, first=not number))
    for name, plot in _LAYER_PLOTS.items():
        numbered = enumerate(runs, start=1)
        with_layers = [(number, run) for number, run in numbered if run.layers and run.layer_steps(plot.modality)]
        scale = plot.scale([run for _, run in with_layers])
        for number, run in with_layers:
            drawing = _bound(plot.draw, run, scale)
            if len(runs) == 1:
                found.append(_picture(name, plot.title, drawing, plot.wide))
            else:
                title, first = f"{plot.title}: {run.name}", run is with_layers[0][1]
                found.append(_picture(f"{name}_{number}", title, drawing, wide=False, first=first))
    return found


def _bound(drawing: Callable[..., None], *data: Any) -> Callable[[Axes], None]:
    return lambda axes: drawing(axes, *data)


def _picture(name: str, title: str, drawing: Callable[[Axes], None], wide: bool, first: bool = False) -> Picture:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    size = (9.6, 3.8) if wide else (5.6, 3.4)
    with figure(*size) as (made, [axes]):
        axes.grid(alpha=0.25)
        axes.set_xlabel("step")
        drawing(axes)
        axes.xaxis.set_major_locator(MaxNLocator(10 if wide else 7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylabel(textwrap.fill(axes.get_ylabel(), LABEL_CHARACTERS))
        return Picture(name, title, png(made), wide, first)


def _loss(axes: Axes, runs: Sequence[RunData]) -> None:
    """Draw training loss, held-out loss and baselines; the held-out loss of each source only for a single run."""
    for run, colour in zip(runs, cycle(len(runs)), strict=True):
        name = f"{run.name}: " if len(runs) > 1 else ""
        axes.plot(run.steps, run.values("loss"), color=colour, alpha=0.35, linewidth=1, label=f"{name}training")
        steps = [line["step"] for line in run.held_out]
        mean = [line["heldout_loss"] for line in run.held_out]
        axes.plot(steps, mean, color=colour, marker="o", markersize=4, label=f"{name}held out")
        sources = list(run.held_out[-1].get("heldout", {})) if run.held_out and len(runs) == 1 else []
        for source, other in zip(sources, cycle(len(sources) + 1)[1:], strict=True):
            losses = [line.get("heldout", {}).get(source, {}).get("loss", math.nan) for line in run.held_out]
            style: dict[str, Any] = {"color": other, "linestyle": ":", "marker": ".", "linewidth": 1}
            axes.plot(steps, losses, label=f"held out: {source}", **style)
        for key, dashes in (("unigram_loss", (0, (1, 2))), ("bigram_loss", (0, (5, 3)))):
            value = run.summary.get(key)
            if value is not None:
                label = f"{name}{key.removesuffix('_loss')} model"
                axes.axhline(value, color=colour if len(runs) > 1 else "#555555", linestyle=dashes, label=label)
    axes.set_ylabel(f"loss, {units(runs)}")
    axes.legend(ncols=2, **_SMALL)


def _series(key: str, label: str, factor: float = 1.0, logarithmic: bool = False) -> Callable[..., None]:
    """Return a function that draws one metric of each run."""

    def drawing(axes: Axes, runs: Sequence[RunData]) -> None:
        for run, colour in zip(runs, cycle(len(runs)), strict=True):
            axes.plot(run.steps, [value * factor for value in run.values(key)], color=colour, label=run.name)
        axes.set_ylabel(label)
        if logarithmic and all(value > 0 for run in runs for value in run.values(key)):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if len(runs) > 1:
            axes.legend(**_SMALL)

    return drawing


def _expert_load(axes: Axes, run: RunData, scale: tuple[float, float], modality: str | None = None) -> None:
    """Draw the largest load over the mean: a row for each layer, a column for each logged step. 1: the load is even.

    `modality`: draw the load of its tokens.
    """
    steps, layers = run.layer_steps(modality), len(run.layers)
    axes.grid(False)
    edges = [max(0, steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)), *steps]
    table = run.by_layer("max_over_mean", modality)
    image = axes.pcolormesh(edges, range(layers + 1), table, cmap="cividis", vmin=scale[0], vmax=scale[1])
    axes.set_yticks([place + 0.5 for place in range(layers)], [f"layer {layer}" for layer in run.layers])
    if layers > 16:  # the labels would overlap
        axes.set_yticks(axes.get_yticks()[:: layers // 12 + 1])
    axes.invert_yaxis()
    made: Any = axes.figure
    made.colorbar(image, ax=axes, label="busiest expert over the mean", extend="max")


def _load_scale(runs: Sequence[RunData], *modalities: str) -> tuple[float, float]:
    """Return the colour scale of loads. The largest 2% of each run are beyond it, so that a few do not set it."""
    highest = 2.0
    for run in runs:
        for modality in modalities or (None,):
            loads = sorted(value for row in run.by_layer("max_over_mean", modality) for value in row)
            if loads:
                highest = max(highest, loads[int(0.98 * len(loads))])
    return 1.0, highest


def _load_of(modality: str, title: str) -> _LayerPlot:
    """Return the plot of the load of a modality's tokens. That of the other has the same scale."""
    drawing, scale = partial(_expert_load, modality=modality), lambda runs: _load_scale(runs, "images", "text")
    return _LayerPlot(title, drawing, scale, modality=modality)


def _layers(key: str, label: str, modality: str | None = None) -> Callable[..., None]:
    """Return a function that draws one metric as a line per layer. Shades go from the first layer to the last."""

    def drawing(axes: Axes, run: RunData, scale: tuple[float, float]) -> None:
        from matplotlib import colormaps

        shades = colormaps["viridis"].resampled(max(2, len(run.layers)))
        steps = run.layer_steps(modality)
        for place, (layer, values) in enumerate(zip(run.layers, run.by_layer(key, modality), strict=True)):
            axes.plot(steps, values, color=shades(place), linewidth=1.2, label=f"layer {layer}")
        axes.set_ylabel(label)
        axes.set_ylim(*scale)
        if len(run.layers) <= 12:
            axes.legend(ncols=2, **_SMALL)

    return drawing


def _layer_scale(key: str) -> Callable[[Sequence[RunData]], tuple[float, float]]:
    """Return a function that returns the scale on which a metric of all runs fits, with a margin."""

    def scale(runs: Sequence[RunData]) -> tuple[float, float]:
        found = [value for run in runs for row in run.by_layer(key) for value in row if math.isfinite(value)]
        low, high = min(found, default=0.0), max(found, default=1.0)
        if low == high == 0:
            high = 1.0
        margin = 0.05 * (high - low) or 0.05 * abs(high)
        return low - margin, high + margin

    return scale


def _lines_by_layer(title: str, key: str, label: str) -> _LayerPlot:
    return _LayerPlot(title, _layers(key, label), _layer_scale(key))


_PLOTS = {
    "loss": _Plot("Loss", _loss, wide=True),
    "loss_by_modality": _Plot("Loss with and without images", modalities.losses, metric="loss_by_modality"),
    "answers": _Plot("Answers about pictures", modalities.answers, metric="answers"),
    "retrieval": _Plot("Retrieval among held-out pairs", retrieval.recall, metric="retrieval"),
    "learning_rate": _Plot("Learning rate", _series("learning_rate", "learning rate")),
    "gradient_norm": _Plot(
        "Gradient norm", _series("gradient_norm", "gradient norm before clipping", logarithmic=True)
    ),
    "throughput": _Plot("Throughput", _series("tokens_per_second", "thousand tokens per second", 1e-3)),
    "memory": _Plot("Memory", _series("peak_memory_bytes", "peak memory, GB", 1e-9)),
}
_LAYER_PLOTS = {
    "expert_load": _LayerPlot("Expert load", _expert_load, _load_scale, wide=True),
    "expert_load_images": _load_of("images", "Expert load of image tokens"),
    "expert_load_text": _load_of("text", "Expert load of text tokens"),
    "expert_overlap": _LayerPlot(
        "Experts shared by images and text",
        _layers("expert_overlap", "share of the load that image and text tokens have in common", "images"),
        lambda runs: (0.0, 1.02),
        modality="images",
    ),
    "router_entropy": _lines_by_layer(
        "Router entropy", "router_entropy", "entropy of a token's scores over its maximum"
    ),
    "load_entropy": _lines_by_layer("Load entropy", "entropy", "load entropy over its maximum"),
    "dead_experts": _lines_by_layer("Dead experts", "dead", "experts without tokens"),
    "router_z": _lines_by_layer("Router logits", "router_z", "squared log-sum-exp of the logits"),
}
