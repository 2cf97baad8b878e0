"""Make Matplotlib figures in one style, without a display. Imports Matplotlib, which takes a second, at first use."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's palette, which people with any colour vision can tell apart."""


def cycle(count: int, colours: Sequence[str] = COLOURS) -> list[str]:
    """Return `count` colours; the palette repeats if it is shorter."""
    return [colours[number % len(colours)] for number in range(count)]


@contextmanager
def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, ink: str | None = None, **subplots: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure of `width` by `height` inches and its axes, row by row. `ink`: colour of text and frames that are
    drawn inside the `with` block. `subplots`: further arguments of `Figure.subplots`.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False}
    if ink is not None:
        settings |= dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
        )
    with rc_context(settings):
        made: Figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
        FigureCanvasAgg(made)
        yield made, list(made.subplots(rows, columns, squeeze=False, **subplots).flat)


def png(figure: Figure, transparent: bool = False) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", transparent=transparent)
    return content.getvalue()
