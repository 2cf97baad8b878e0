"""Draw the scores of examinations over the steps of runs, with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.plotting import cycle
from train.exam.results import StepScore
from train.report.run import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMALL: dict[str, Any] = {"fontsize": 8, "frameon": False}
_MOST_BARS = 12
"""Scores with an error bar each. More of them get a band."""


def labels(runs: Sequence[RunData]) -> list[str]:
    """Return the examinations that a run was asked at a known step."""
    return list({label: None for run in runs for label in run.examinations if by_step(run, label)})


def by_step(run: RunData, label: str) -> list[StepScore]:
    """Return the scores of an examination by step, the last one of each step."""
    found = {one.step: one for one in run.examinations.get(label, []) if one.step is not None}
    return [found[step] for step in sorted(found)]


def draw_scores(axes: Axes, runs: Sequence[RunData], label: str) -> None:
    """Draw the scores of one examination: a line for each run, with intervals. Dotted: the scores on questions that are
    not in the training corpus, if some are in it.
    """
    for run, colour in zip(runs, cycle(len(runs)), strict=True):
        scores = by_step(run, label)
        if not scores:
            continue
        steps, values = [one.step or 0 for one in scores], [one.score for one in scores]
        low, high = [one.low for one in scores], [one.high for one in scores]
        text = run.name if len(runs) > 1 else "all questions"
        axes.plot(steps, values, color=colour, marker="o", markersize=4, clip_on=False, label=text)
        if len(scores) > _MOST_BARS:
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.vlines(steps, low, high, color=colour, alpha=0.5, linewidth=1.2)
        clean = [math.nan if one.clean is None else one.clean for one in scores]
        if not all(map(math.isnan, clean)):
            name = "questions that are not in the corpus"
            text = f"{run.name}: {name}" if len(runs) > 1 else name
            axes.plot(steps, clean, color=colour, linestyle=":", marker=".", clip_on=False, label=text)
    axes.set_ylabel("score, with 95% interval")
    axes.set_ylim(0, 1.02)
    axes.margins(x=0.05)
    if len(axes.get_lines()) > 1:
        axes.legend(**_SMALL)
