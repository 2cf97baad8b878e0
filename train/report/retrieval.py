"""Draw what a report shows of held-out image-caption pairs: how often the nearest caption or picture is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from core.plotting import cycle
from train.report.modalities import series
from train.report.run import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"to_text": "captions of pictures", "to_image": "pictures of captions", "chance": "chance"}
_DASHES: dict[str, Any] = {"to_text": "-", "to_image": (0, (5, 2)), "chance": (0, (1, 2))}


def recall(axes: Axes, runs: Sequence[RunData]) -> None:
    """Draw how often the nearest caption of a held-out picture, and the nearest picture of a caption, is right."""
    measured = [run for run in runs if run.has("retrieval")]
    for run, colour in zip(measured, cycle(len(measured)), strict=True):
        for key, name in NAMES.items():
            label = f"{run.name}: {name}" if len(runs) > 1 else name
            style: dict[str, Any] = {"color": colour, "linestyle": _DASHES[key], "marker": "."}
            axes.plot(*series(run.held_out, "retrieval", key), label=label, **style)
    axes.set_ylabel("held-out pairs found first")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)


def rows(runs: Sequence[RunData]) -> Iterator[tuple[str, list[Any], str]]:
    """Yield rows of the report's table: label, the value of each run, and how it is formatted."""
    last = [run.held_out[-1].get("retrieval", {}) if run.held_out else {} for run in runs]
    if any(last):
        yield "held-out pairs", [one.get("pairs") for one in last], ",d"
        for key, name in NAMES.items():
            yield f"found first: {name}", [one.get(key) for one in last], ".2%"
