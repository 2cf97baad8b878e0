"""Draw the plots of an audit as PNG: histograms of scores, and scores against labels.

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
    only with several domains) and `proof` (scores against labels).
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
    if audit["proof"] and audit["proof"]["scorers"]:
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

    areas, bars = panels
    for place, one in enumerate(proof["scorers"]):
        ends = [[one["auc"] - one["low"]], [one["high"] - one["auc"]]]
        areas.errorbar([one["auc"]], [place], xerr=ends, fmt="o", markersize=5, color=DROPPED if place else KEPT)
    areas.axvline(0.5, color=areas.xaxis.label.get_color(), linewidth=0.8, linestyle="--")
    names = [textwrap.shorten(one["name"].encode("ascii", "replace").decode(), 40) for one in proof["scorers"]]
    areas.set_yticks(range(len(names)), names)
    for label in areas.get_yticklabels():
        label.set_parse_math(False)
    areas.invert_yaxis()
    areas.set_xlabel("AUC inside domain and length buckets")
    spans = [f"{one['from']:g}" + (f" to {one['to']:g}" if one["to"] > one["from"] else "") for one in proof["kept"]]
    bars.bar(range(len(spans)), [one["kept"] or 0 for one in proof["kept"]], color=KEPT)
    ticks = [f"{span}\n({one['documents']:,})" for span, one in zip(spans, proof["kept"], strict=True)]
    bars.set_xticks(range(len(spans)), ticks)
    bars.yaxis.set_major_formatter(PercentFormatter(1))
    bars.set(xlabel="label (records)", ylabel="fraction kept", ylim=(0, 1))
