"""The pictures of an audit, as PNG: histograms of scores, and score against length.

They are drawn on nothing, in ink for a light or a dark page. What was kept is blue and what was not is orange (Okabe
and Ito's, told apart with any colour vision, and one darker than the other). No name from the data is drawn: a font
may not have its letters, so the page says them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from core.plotting import figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT, DROPPED = "#0072B2", "#E69F00"
_LIGHT, _DARK = "#222222", "#dddddd"
_WIDE_INCHES, _NARROW_INCHES = (9.6, 3.4), (5.6, 2.7)


def draw(audit: dict[str, Any], dark: bool = False) -> dict[str, bytes]:
    """Name -> PNG: `scores` of all, `scores_N` of the N-th shown domain where there are several, `length`."""
    ink, scores = (_DARK if dark else _LIGHT), audit["scores"]
    pictures: dict[str, bytes] = {}
    if scores["overall"]:
        measures = audit["scorer"]["measures"]
        several = len(scores["domains"]) > 1
        only = next(iter(scores["domains"]), None)
        found = [] if several else thresholds(audit, only)
        pictures["scores"] = _picture(
            _WIDE_INCHES, ink, _histogram(scores["overall"], scores["edges"], found, measures)
        )
        for place, (name, histogram) in enumerate(scores["domains"].items()):
            if several:
                drawing = _histogram(histogram, scores["edges"], thresholds(audit, name), "score")
                pictures[f"scores_{place}"] = _picture(_NARROW_INCHES, ink, drawing)
    if audit["length"]["picture"]:
        pictures["length"] = _picture(_WIDE_INCHES, ink, _score_by_length(audit["length"]["picture"]), panels=2)
    return pictures


def thresholds(audit: dict[str, Any], domain: str | None) -> list[float]:
    """Lowest kept scores of a domain, one per length bucket that has one."""
    buckets = audit["thresholds"].get("domains", {}).get(domain, {}).get("buckets", [])
    return sorted(bucket["score"] for bucket in buckets if bucket["score"] is not None)


def _picture(size: tuple[float, float], ink: str, drawing: Callable[[list[Axes]], None], panels: int = 1) -> bytes:
    """A picture with `panels` side by side, on which `drawing` has drawn."""
    with figure(*size, columns=panels, ink=ink) as (made, axes):
        drawing(axes)
        return png(made, transparent=True)


def _histogram(
    histogram: dict[str, Any], edges: list[float], thresholds: list[float], label: str
) -> Callable[[list[Axes]], None]:
    def drawing(panels: list[Axes]) -> None:
        from matplotlib.ticker import MaxNLocator

        (axes,) = panels
        documents, kept = np.array(histogram["documents"]), np.array(histogram["kept"])
        axes.stairs(kept, edges, fill=True, color=KEPT, label="kept")
        axes.stairs(documents, edges, baseline=kept, fill=True, color=DROPPED, label="left out")
        shown = [threshold for threshold in thresholds if edges[0] <= threshold <= edges[-1]]
        if shown:
            ink, what = axes.xaxis.label.get_color(), "threshold" if len(shown) == 1 else "thresholds by length"
            where = axes.get_xaxis_transform()  # lines over the bars would hide them: there may be 64
            axes.plot(
                shown, [1.0] * len(shown), "v", color=ink, markersize=5, transform=where, clip_on=False, label=what
            )
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, documents.max() * 1.08 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(label, parse_math=False)
        axes.set_ylabel("documents")
        axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1.01), borderaxespad=0.2)

    return drawing


def _score_by_length(picture: dict[str, Any]) -> Callable[[list[Axes]], None]:
    """Two maps: how many records there are, and which share of them was kept."""

    def drawing(panels: list[Axes]) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import LinearSegmentedColormap, LogNorm
        from matplotlib.ticker import FuncFormatter

        documents, kept = np.array(picture["documents"]), np.array(picture["kept"])
        there = np.ma.masked_less(documents, 1)
        # neither end of this part of the scale is lost on white or on black
        middle = LinearSegmentedColormap.from_list("middle", colormaps["cividis"](np.linspace(0.15, 0.95, 256)))
        sides = LinearSegmentedColormap.from_list("sides", [DROPPED, "#b9b9b9", KEPT])
        many = LogNorm(1, max(2, documents.max()))
        maps: list[tuple[Any, Any, dict[str, Any], str]] = [
            (there, middle, {"norm": many}, "records in the sample"),
            (kept / there, sides, {"vmin": 0, "vmax": 1}, "share kept"),
        ]
        for axes, (values, colours, scale, label) in zip(panels, maps, strict=True):
            ink = axes.xaxis.label.get_color()
            image = axes.pcolormesh(picture["bytes_edges"], picture["score_edges"], values, cmap=colours, **scale)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _size(size)))
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda size, _: ""))
            axes.set_xlabel("length")
            axes.set_ylabel("score")
            made: Any = axes.figure
            bar = made.colorbar(image, ax=axes, label=label)
            bar.outline.set_edgecolor(ink)
            bar.ax.yaxis.set_major_formatter("{x:,g}")

    return drawing


def _size(size: float) -> str:
    """Bytes for a tick: 300, 1k, 20M."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{size / factor:g} {letter}B"
    return f"{size:g} B"
