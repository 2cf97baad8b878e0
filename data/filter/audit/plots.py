"""Draw the plots of an audit as PNG: histograms of scores, and score against length.

The background is transparent, and the colour of text and axes suits a light or a dark page. Kept records are blue and
dropped records orange (Okabe and Ito's palette: distinct in brightness and with any colour vision). No name from the
data is drawn, because a font may lack its letters; the page shows the names.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from core.plotting import figure, png

KEPT, DROPPED = "#0072B2", "#E69F00"
_LIGHT, _DARK = "#222222", "#dddddd"
_WIDE_INCHES, _NARROW_INCHES = (9.6, 3.4), (5.6, 2.7)


def draw(audit: dict[str, Any], dark: bool = False) -> dict[str, bytes]:
    """Return PNG files by name: `scores` (histogram of all records), `scores_N` (histogram of the N-th shown domain,
    only with several domains), `length` (score against length) and `proof` (score against labels).
    """
    ink, scores = (_DARK if dark else _LIGHT), audit["scores"]
    edges, domains = scores["edges"], scores["domains"]
    pictures: dict[str, bytes] = {}
    if scores["overall"]:
        limits = [] if len(domains) > 1 else thresholds(audit, next(iter(domains), None))
        drawing = partial(_histogram, scores["overall"], edges, limits, audit["scorer"]["measures"])
        pictures["scores"] = picture(_WIDE_INCHES, drawing, ink)
        for place, (name, histogram) in enumerate(domains.items() if len(domains) > 1 else ()):
            drawing = partial(_histogram, histogram, edges, thresholds(audit, name), "score")
            pictures[f"scores_{place}"] = picture(_NARROW_INCHES, drawing, ink)
    if audit["length"]["picture"]:
        drawing = partial(_score_by_length, audit["length"]["picture"])
        pictures["length"] = picture(_WIDE_INCHES, drawing, ink, panels=2)
    if audit["proof"] and (audit["proof"]["scorers"] or audit["proof"]["kept"]):
        pictures["proof"] = picture(_WIDE_INCHES, partial(_against_labels, audit["proof"]), ink, panels=2)
    return pictures


def thresholds(audit: dict[str, Any], domain: str | None) -> list[float]:
    """Return the lowest kept scores of a domain, one for each length bucket that keeps a record."""
    buckets = audit["thresholds"].get("domains", {}).get(domain, {}).get("buckets", [])
    return sorted(bucket["score"] for bucket in buckets if bucket["score"] is not None)


def picture(
    size: tuple[float, float],
    drawing: Callable[[Any], None],
    ink: str = _LIGHT,
    panels: int = 1,
    transparent: bool = True,
) -> bytes:
    """Return a PNG. `drawing` receives the axes, or a list of axes if `panels` is more than one."""
    with figure(*size, columns=panels, ink=ink) as (made, axes):
        drawing(axes[0] if panels == 1 else axes)
        return png(made, transparent=transparent)


def _histogram(histogram: dict[str, Any], edges: list[float], limits: list[float], label: str, axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    documents, kept = np.array(histogram["documents"]), np.array(histogram["kept"])
    axes.stairs(kept, edges, fill=True, color=KEPT, label="kept")
    axes.stairs(documents, edges, baseline=kept, fill=True, color=DROPPED, label="dropped")
    shown = [limit for limit in limits if edges[0] <= limit <= edges[-1]]
    if shown:  # mark thresholds above the bars: up to 64 lines through the bars would hide them
        ink, what = axes.xaxis.label.get_color(), "threshold" if len(shown) == 1 else "thresholds by length"
        style: dict[str, Any] = {"color": ink, "markersize": 5, "clip_on": False, "label": what}
        axes.plot(shown, [1.0] * len(shown), "v", transform=axes.get_xaxis_transform(), **style)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, documents.max() * 1.08 or 1)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(textwrap.fill(label, 110), parse_math=False)
    axes.set_ylabel("documents")
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1.01), borderaxespad=0.2)


def _against_labels(proof: dict[str, Any], panels: Any) -> None:
    """Draw the AUC of each scorer with its interval, and the kept fraction by label."""
    from matplotlib.ticker import PercentFormatter

    areas, kept = panels
    ink, found = areas.xaxis.label.get_color(), proof["scorers"]
    for place, one in enumerate(found):
        ends = [[one["auc"] - one["low"]], [one["high"] - one["auc"]]]
        colour = KEPT if place == 0 else DROPPED
        areas.errorbar([one["auc"]], [place], xerr=ends, fmt="o", markersize=6 - 2 * (place > 0), color=colour)
    areas.axvline(0.5, color=ink, linewidth=0.8, linestyle="--")
    areas.set_yticks(range(len(found)), [_ascii(one["name"]) for one in found])
    for label in areas.get_yticklabels():
        label.set_parse_math(False)
    areas.invert_yaxis()
    areas.set_xlabel("AUC inside domain and length buckets")
    shares = [one["kept"] or 0 for one in proof["kept"]]
    kept.bar(range(len(shares)), shares, color=KEPT)
    names = [f"{one['from']:g}" + (f" to {one['to']:g}" if one["to"] > one["from"] else "") for one in proof["kept"]]
    kept.set_xticks(
        range(len(shares)), [f"{name}\n({one['documents']:,})" for name, one in zip(names, proof["kept"], strict=True)]
    )
    kept.set_ylim(0, 1)
    kept.yaxis.set_major_formatter(PercentFormatter(1))
    kept.set_xlabel("label (records)")
    kept.set_ylabel("fraction kept")


def _ascii(name: str) -> str:
    """Return a scorer's name in letters that every font has."""
    return textwrap.shorten(name.encode("ascii", "replace").decode(), 40)


def _score_by_length(figures: dict[str, Any], panels: Any) -> None:
    """Draw two heat maps: the number of records, and the fraction of them that was kept."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import EngFormatter, NullFormatter

    documents, kept = np.array(figures["documents"]), np.array(figures["kept"])
    present = np.ma.masked_less(documents, 1)
    # leave out the ends of the colour scale, which vanish on white or on black
    middle = LinearSegmentedColormap.from_list("middle", colormaps["cividis"](np.linspace(0.15, 0.95, 256)))
    sides = LinearSegmentedColormap.from_list("sides", [DROPPED, "#b9b9b9", KEPT])
    maps: list[tuple[Any, Any, dict[str, Any], str]] = [
        (present, middle, {"norm": LogNorm(1, max(2, documents.max()))}, "records in the sample"),
        (kept / present, sides, {"vmin": 0, "vmax": 1}, "fraction kept"),
    ]
    for axes, (values, colours, scale, label) in zip(panels, maps, strict=True):
        image = axes.pcolormesh(figures["bytes_edges"], figures["score_edges"], values, cmap=colours, **scale)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("length")
        axes.set_ylabel("score")
        bar = axes.figure.colorbar(image, ax=axes, label=label)
        bar.outline.set_edgecolor(axes.xaxis.label.get_color())
        bar.ax.yaxis.set_major_formatter("{x:,g}")
        bar.ax.yaxis.set_minor_formatter("{x:,g}")
