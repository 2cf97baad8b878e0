"""Draw what a report shows of documents with images and of text alone: losses, and right answers about pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from core.plotting import cycle
from train.report.run import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"images": "documents with images", "text": "text alone"}
"""What a report calls the modalities."""
SHOWN = {"own": "own pictures", "other": "another document's pictures", "none": "black pictures"}
_SMALL: dict[str, Any] = {"fontsize": 8, "frameon": False}
_DASHES = {"own": "-", "other": (0, (5, 2)), "none": (0, (1, 2))}


def series(lines: Sequence[dict[str, Any]], *path: str) -> tuple[list[int], list[float]]:
    """Return the steps of the lines that have a value at a path of keys, and the values."""
    found = []
    for line in lines:
        value: Any = line
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append((line["step"], value))
    return [step for step, _ in found], [value for _, value in found]


def losses(axes: Axes, runs: Sequence[RunData]) -> None:
    """Draw training and held-out loss of each modality."""
    pairs = [(run, name) for run in runs for name in NAMES]
    for (run, name), colour in zip(pairs, cycle(len(pairs)), strict=True):
        label = f"{run.name}: {NAMES[name]}" if len(runs) > 1 else NAMES[name]
        axes.plot(*series(run.lines, "loss_by_modality", name), color=colour, alpha=0.35, linewidth=1)
        held_out = series(run.held_out, "heldout_by_modality", name, "loss")
        axes.plot(*held_out, color=colour, marker="o", markersize=4, label=label)
    axes.set_ylabel("nats per token; dots: held out")
    axes.legend(**_SMALL)


def answers(axes: Axes, runs: Sequence[RunData]) -> None:
    """Draw how often the last token of a held-out document is predicted, by the pictures that the model sees."""
    kinds = [(run, source, shown) for run in runs for source in answered(run) for shown in SHOWN]
    for (run, source, shown), colour in zip(kinds, cycle(len(kinds)), strict=True):
        name = ": ".join([*([run.name] if len(runs) > 1 else []), source])
        steps, rates = series(run.held_out, "answers", source, shown)
        style: dict[str, Any] = {"color": colour, "linestyle": _DASHES[shown], "marker": "."}
        axes.plot(steps, rates, label=f"{name}, {SHOWN[shown]}", **style)
    axes.set_ylabel("right answers of held-out documents")
    axes.set_ylim(0, 1.02)
    axes.legend(**_SMALL)


def answered(run: RunData) -> list[str]:
    """Return the sources with answers in an evaluation."""
    return list({source: None for line in run.held_out for source in line.get("answers", {})})


def summary(runs: Sequence[RunData]) -> Iterator[tuple[str, list[Any], str]]:
    """Yield rows of the report's table: label, the value of each run, and how it is formatted."""
    last = [run.held_out[-1] if run.held_out else {} for run in runs]
    for name, text in NAMES.items():
        values = [line.get("heldout_by_modality", {}).get(name, {}).get("loss") for line in last]
        if any(value is not None for value in values):
            yield f"held-out loss: {text}", values, ".4f"
    for source in {source: None for line in last for source in line.get("answers", {})}:
        for shown, text in SHOWN.items():
            values = [line.get("answers", {}).get(source, {}).get(shown) for line in last]
            yield f"right answers: {source}, {text}", values, ".1%"
