"""Draw a plan: memory by component, the pipeline's timeline, the step's time as a waterfall, memory against speed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from core.plotting import COLOURS, cycle, figure, png
from launch.plan.memory import GIB
from launch.plan.search.finalists import LayoutPlan
from launch.plan.search.footprint import COMPONENTS
from launch.plan.search.report import SearchReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_RANKS = 8
"""Ranks of a pipeline that a picture shows."""
_WORK = {"F": ("forward", COLOURS[0]), "B": ("backward", COLOURS[1]), "I": ("backward, inputs", COLOURS[1])}
_WORK |= {"W": ("backward, weights", COLOURS[2])}
_CAUSES = {
    "products": "products",
    "attention": "attention",
    "elementwise": "elementwise",
    "recomputed": "recomputed",
    "tp": "tensor parallelism",
    "cp": "context parallelism",
    "ep": "expert exchange",
    "host": "host",
    "imbalance": "expert imbalance",
    "head": "head and loss",
    "bubble": "pipeline bubble",
    "data": "data parallelism",
    "optimizer": "optimizer",
}


class PlanPicture(NamedTuple):
    name: str
    title: str
    png: bytes


def draw_plan(report: SearchReport, usable: float) -> list[PlanPicture]:
    """Return the pictures of a search. `usable`: bytes of a GPU that a run may allocate."""
    best = report.plans[0]
    found = [_picture("memory", "Memory of each kind of rank, best layout", 5.2, _memory, best, usable)]
    found.append(_picture("step", "Where a step's time goes, best layout", 4.2, _waterfall, report, best))
    if best.simulated is not None:
        found.append(_picture("pipeline", "The pipeline's first and last passes, best layout", 4.0, _timeline, best))
    found.append(_picture("frontier", "Memory against speed: every layout that fits", 4.2, _frontier, report, usable))
    return found


def _picture(name: str, title: str, height: float, draw: Callable[..., None], *given: object) -> PlanPicture:
    with figure(9.0, height) as (made, (axes,)):
        draw(axes, *given)
        return PlanPicture(name, title, png(made))


def _memory(axes: Axes, best: LayoutPlan, usable: float) -> None:
    stages = best.stages
    if len(stages) > _MOST_RANKS:
        fullest = best.fullest
        step = -(-len(stages) // (_MOST_RANKS - 1))
        stages = sorted(
            {one.first: one for one in (*stages[::step], stages[-1], fullest)}.values(), key=lambda one: one.first
        )
    names = [
        "all GPUs" if best.layout.pp == 1 else f"rank {one.first}" + (f" and {one.ranks - 1} more" * (one.ranks > 1))
        for one in stages
    ]
    left = [0.0] * len(stages)
    for component, colour in zip(COMPONENTS, cycle(len(COMPONENTS)), strict=True):
        sizes = [one.parts[component] / GIB for one in stages]
        axes.barh(names, sizes, left=left, color=colour, label=component, height=0.7)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, size in enumerate(left):
        axes.text(size, place, f" {size:.1f}", va="center", fontsize=9)
    axes.axvline(usable / GIB, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        "usable", (usable / GIB, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9
    )
    axes.invert_yaxis()
    axes.set_xlim(0, max(usable / GIB, *left) * 1.12)
    axes.set_xlabel("GiB")
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.legend(ncols=4, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _mark_usable(axes: Axes, usable: float) -> None:
    place = usable / GIB
    axes.axvline(place, color="black", linestyle="--", linewidth=1, zorder=1)
    axes.annotate("usable", (place, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9)


def _waterfall(axes: Axes, report: SearchReport, best: LayoutPlan) -> None:
    parts = {name: seconds for name, seconds in best.seconds.items() if seconds > 0.002 * best.step_s}
    starts = list(itertools.accumulate(parts.values(), initial=0.0))[:-1]
    work = ("products", "attention", "elementwise", "head", "optimizer")
    colours = [COLOURS[0] if name in work else COLOURS[1] for name in parts]
    names = [_CAUSES[name] for name in parts]
    axes.barh(names, list(parts.values()), left=starts, color=colours, height=0.7)
    for place, (start, seconds) in enumerate(zip(starts, parts.values(), strict=True)):
        axes.text(start + seconds, place, f" {seconds:.2f} s", va="center", fontsize=9)
    bar = report.bar(best, "time")
    low, high = best.step_s * bar.low, best.step_s * bar.high
    axes.barh(["step"], [best.step_s], color="#999999", height=0.7)
    axes.errorbar(
        [best.step_s], [len(parts)], xerr=[[best.step_s - low], [high - best.step_s]], color="black", capsize=4
    )
    axes.text(high, len(parts), f"  {best.step_s:.2f} s", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, high * 1.15)
    axes.set_xlabel("seconds of a step (blue: the model's work; orange: what parallelism and memory cost)")


def _timeline(axes: Axes, best: LayoutPlan) -> None:
    assert best.simulated is not None
    pp = best.layout.pp
    shown = [round(at * (pp - 1) / (min(pp, _MOST_RANKS) - 1)) for at in range(min(pp, _MOST_RANKS))]
    kinds = dict.fromkeys(span.piece[0] for span in best.simulated.spans)
    for kind in kinds:
        label, colour = _WORK[kind]
        for row, rank in enumerate(shown):
            spans = [one for one in best.simulated.spans if one.rank == rank and one.piece[0] == kind]
            bars = [(one.begin, one.end - one.begin) for one in spans]
            axes.broken_barh(bars, (row - 0.4, 0.8), color=colour, linewidth=0, label=label if row == 0 else None)
    axes.set_yticks(range(len(shown)), [f"rank {rank}" for rank in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, best.simulated.step)
    idle = best.seconds["bubble"] / best.step_s
    axes.set_xlabel(f"seconds (a shortened step; in the whole step the bubble takes {idle:.1%})")
    axes.legend(ncols=3, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _frontier(axes: Axes, report: SearchReport, usable: float) -> None:
    memory, seconds = report.result.points
    rate = report.tokens / report.world / seconds
    axes.scatter(memory / GIB, rate, s=9, color="#BBBBBB", label="layouts that fit")
    for place, plan in enumerate(report.plans, start=1):
        axes.scatter(plan.memory / GIB, report.rate(plan), s=45, color=COLOURS[1], zorder=3)
        near = [p for p in report.plans[: place - 1] if _near(p, plan)]
        shift = (6, 6 - 11 * len(near))
        axes.annotate(f"{place}", (plan.memory / GIB, report.rate(plan)), xytext=shift, textcoords="offset points")
    axes.axvline(usable / GIB, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        "usable", (usable / GIB, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9
    )
    axes.set_xlabel("GiB of the fullest rank")
    axes.set_ylabel("tokens per second and GPU")
    axes.set_ylim(bottom=0)


def _near(one: LayoutPlan, other: LayoutPlan) -> bool:
    return abs(one.memory / other.memory - 1) < 0.02 and abs(one.step_s / other.step_s - 1) < 0.04
