"""The pictures of a report, as PNG. Several runs share the axes; figures of one run's layers get a picture each.

Colours are Okabe and Ito's, which people with any colour vision tell apart.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from train.report.run import RunData

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
WIDE = ("loss", "expert_load")
"""Pictures that take the page's whole width; two of the others share a row."""
_LABEL_LETTERS = 36  # of a label up the side: more are cut off
_WIDE_INCHES, _NARROW_INCHES, _DPI = (9.6, 3.8), (5.6, 3.4), 120


def draw(runs: Sequence[RunData]) -> dict[str, bytes]:
    """Name -> PNG of every picture that the runs have figures for."""
    pictures = {"loss": _loss, "learning_rate": _line("learning_rate", "learning rate", 1.0)}
    pictures["gradient_norm"] = _line("gradient_norm", "gradient norm before clipping", 1.0, logarithmic=True)
    pictures["throughput"] = _line("tokens_per_second", "thousand tokens per second", 1e-3)
    pictures["memory"] = _line("peak_memory_bytes", "peak memory, GB", 1e-9)
    found = {name: _picture(runs, drawing, name in WIDE) for name, drawing in pictures.items()}
    for number, run in enumerate(runs):
        if run.layers:
            ending = f"_{number + 1}" if len(runs) > 1 else ""
            found[f"expert_load{ending}"] = _picture([run], _expert_load, wide=True)
            entropy = _of_routers("router_entropy", "entropy of a token's scores over its maximum")
            found[f"router_entropy{ending}"] = _picture([run], entropy)
            found[f"load_entropy{ending}"] = _picture([run], _per_layer("entropy", "load entropy over its maximum"))
            found[f"dead_experts{ending}"] = _picture([run], _per_layer("dead", "experts without a token"))
            found[f"router_z{ending}"] = _picture([run], _of_routers("router_z", "squared log-sum-exp of the logits"))
    return found


def _picture(runs: Sequence[RunData], drawing: Callable[[Axes, Sequence[RunData]], None], wide: bool = False) -> bytes:
    content = io.BytesIO()
    drawn(runs, drawing, wide).savefig(content, format="png")
    return content.getvalue()


def drawn(runs: Sequence[RunData], drawing: Callable[[Axes, Sequence[RunData]], None], wide: bool) -> Figure:
    """A figure with one pair of axes, on which `drawing` has drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = _WIDE_INCHES if wide else _NARROW_INCHES
    figure: Figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_xlabel("step")
    drawing(axes, runs)
    axes.set_ylabel(textwrap.fill(axes.get_ylabel(), _LABEL_LETTERS))
    return figure


def _loss(axes: Axes, runs: Sequence[RunData]) -> None:
    """Training loss, held-out loss per source and the baselines. With several runs, the mean over sources only."""
    for run, colour in zip(runs, _cycle(len(runs)), strict=True):
        name = f"{run.name}: " if len(runs) > 1 else ""
        axes.plot(run.steps, run.values("loss"), color=colour, alpha=0.35, linewidth=1, label=f"{name}training")
        steps = [line["step"] for line in run.held_out]
        mean = [line["heldout_loss"] for line in run.held_out]
        axes.plot(steps, mean, color=colour, marker="o", markersize=4, label=f"{name}held out")
        if len(runs) == 1:
            sources = list(run.held_out[-1]["heldout"]) if run.held_out else []
            for source, other in zip(sources, _cycle(len(sources) + 1)[1:], strict=True):
                losses = [line["heldout"].get(source, {}).get("loss") for line in run.held_out]
                axes.plot(
                    steps, losses, color=other, linestyle=":", marker=".", linewidth=1, label=f"held out: {source}"
                )
        for key, style in (("unigram_loss", (0, (1, 2))), ("bigram_loss", (0, (5, 3)))):
            value = (run.summary or {}).get(key)
            if value is not None:
                label = f"{name}{key.removesuffix('_loss')} model"
                axes.axhline(value, color=colour if len(runs) > 1 else "#555555", linestyle=style, label=label)
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize=8, ncols=2, frameon=False)


def _line(key: str, label: str, factor: float, logarithmic: bool = False) -> Callable[[Axes, Sequence[RunData]], None]:
    def drawing(axes: Axes, runs: Sequence[RunData]) -> None:
        for run, colour in zip(runs, _cycle(len(runs)), strict=True):
            axes.plot(run.steps, [value * factor for value in run.values(key)], color=colour, label=run.name)
        axes.set_ylabel(label)
        if logarithmic and all(value > 0 for run in runs for value in run.values(key)):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if len(runs) > 1:
            axes.legend(fontsize=8, frameon=False)

    return drawing


def _expert_load(axes: Axes, runs: Sequence[RunData]) -> None:
    """Layers down, steps across; 1 is an even load."""
    (run,) = runs
    table = [[load["max_over_mean"] for load in line["expert_load"]] for line in run.lines if "expert_load" in line]
    steps = [line["step"] for line in run.lines if "expert_load" in line]
    columns = list(zip(*table, strict=True))
    top = max(2.0, sorted(value for row in table for value in row)[int(0.98 * len(table) * len(run.layers))])
    axes.grid(False)
    edges = [steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1), *steps]
    image = axes.pcolormesh(edges, range(len(columns) + 1), columns, cmap="cividis", vmin=1.0, vmax=top)
    axes.set_yticks([place + 0.5 for place in range(len(columns))], [f"layer {layer}" for layer in run.layers])
    if len(columns) > 16:  # names would lie on each other
        axes.set_yticks(axes.get_yticks()[:: len(columns) // 12 + 1])
    axes.invert_yaxis()
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes, label="busiest expert over the mean", extend="max")


def _per_layer(key: str, label: str) -> Callable[[Axes, Sequence[RunData]], None]:
    def drawing(axes: Axes, runs: Sequence[RunData]) -> None:
        (run,) = runs
        _layers(axes, run, [[load[key] for load in line["expert_load"]] for line in run.lines if "expert_load" in line])
        axes.set_ylabel(label)

    return drawing


def _of_routers(key: str, label: str) -> Callable[[Axes, Sequence[RunData]], None]:
    def drawing(axes: Axes, runs: Sequence[RunData]) -> None:
        (run,) = runs
        _layers(axes, run, [line[key] for line in run.lines if key in line])
        axes.set_ylabel(label)

    return drawing


def _layers(axes: Axes, run: RunData, table: list[list[float]]) -> None:
    """A line per layer, shaded from the first to the last."""
    from matplotlib import colormaps

    shades = colormaps["viridis"].resampled(max(2, len(run.layers)))
    steps = [line["step"] for line in run.lines if "expert_load" in line]
    for place, (layer, values) in enumerate(zip(run.layers, zip(*table, strict=True), strict=True)):
        axes.plot(steps, values, color=shades(place), linewidth=1.2, label=f"layer {layer}")
    if len(run.layers) <= 12:
        axes.legend(fontsize=8, frameon=False, ncols=2)


def _cycle(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
