"""Curves, bars of recent values and heat maps made of characters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from launch.watch.curve import CurvePoint
from launch.watch.run import LoggedLoad

LABELS = 8
"""Width of the labels of the vertical axis."""
BRAILLE, COLUMNS, ROWS = 0x2800, 2, 4
"""The first braille character, and the dots of one across and down."""
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bits of the dots of a character, by column and row."""
BARS = "▁▂▃▄▅▆▇█"
LEVELS = (1.5, 2.0, 3.0, 4.0)
"""Largest load of an expert over the mean at which the next shade begins."""
SHADES, PLAIN_SHADES = "·░▒▓█", ".:oO#"
SHADE_STYLES = ("blue", "cyan", "green", "yellow", "red")
DEAD = "x"


@dataclass(frozen=True)
class PlotSeries:
    """A curve to draw. `marker`: the character to draw with where there are no colours, or always if `is_sparse`."""

    points: list[CurvePoint]
    style: str
    marker: str
    is_sparse: bool = False


class Drawing:
    """Calls a function with the columns and lines that are left for it, `colour` and `ascii_only`."""

    def __init__(self, draw: Callable[[int, int, bool, bool], Text]) -> None:
        self.draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or 12
        drawn = self.draw(options.max_width, height, console.color_system is not None, options.ascii_only)
        drawn.no_wrap, drawn.overflow, drawn.end = True, "crop", ""
        yield drawn


def plot(series: Sequence[PlotSeries], width: int, height: int, colour: bool, ascii_only: bool) -> Text:
    """Draw curves over steps with labelled axes, in `height` lines of `width` characters."""
    points = [point for one in series for point in one.points]
    columns, rows = width - LABELS - 1, height - 1
    if columns < 2 or rows < 2:
        return Text("")
    if not points:
        return Text("no values yet", "dim")
    steps = min(point.first for point in points), max(point.last for point in points)
    low, high = min(point.low for point in points), max(point.high for point in points)
    if high - low <= 1e-9 * abs(high):
        low, high = low - max(1e-9, abs(low) * 0.05), high + max(1e-9, abs(high) * 0.05)
    canvas = DotCanvas(columns, rows, steps, (low, high))
    several = sum(not one.is_sparse for one in series) > 1
    for one in series:
        marked = one.is_sparse or ascii_only or (several and not colour)
        canvas.draw(one, one.marker if marked else "")
    text = Text()
    labels = {0: high, (rows - 1) // 2: high - (high - low) * ((rows - 1) // 2) / max(1, rows - 1), rows - 1: low}
    for row in range(rows):
        label = f"{labels[row]:.4g}" if row in labels else ""
        text.append(f"{label:>{LABELS}.{LABELS}}{'|' if ascii_only else '┤' if label else '│'}", "dim")
        for character, style in canvas.row(row):
            text.append(character, style)
        text.append("\n")
    first, last = f"step {steps[0]:,}", f"{steps[1]:,}"
    text.append(f"{'':{LABELS + 1}}{first}{last:>{max(1, columns - len(first))}}", "dim")
    return text


class DotCanvas:
    """Characters with braille dots or markers. The last series that draws into a character gives its style."""

    def __init__(self, columns: int, rows: int, steps: tuple[int, int], values: tuple[float, float]) -> None:
        self.columns, self.rows, self.steps, self.values = columns, rows, steps, values
        self._bits = [[0] * columns for _ in range(rows)]
        self._markers = [[""] * columns for _ in range(rows)]
        self._styles = [[""] * columns for _ in range(rows)]

    def draw(self, series: PlotSeries, marker: str) -> None:
        """Draw a curve, or only its points if it is sparse."""
        spans = self._spans(series.points)
        before: tuple[int, float, float] | None = None
        for x, (top, bottom) in sorted(spans.items()):
            if before is not None and not series.is_sparse:
                self._connect(before, (x, top, bottom), series.style, marker)
            middle = (top + bottom) / 2
            self._fill(x, *((middle, middle) if series.is_sparse else (top, bottom)), series.style, marker)
            before = x, top, bottom

    def row(self, row: int) -> list[tuple[str, str]]:
        """Return the characters of a row with their styles."""
        return [
            (marker or (chr(BRAILLE + bits) if bits else " "), style)
            for bits, marker, style in zip(self._bits[row], self._markers[row], self._styles[row], strict=True)
        ]

    def _spans(self, points: Sequence[CurvePoint]) -> dict[int, tuple[float, float]]:
        """Return the highest and the lowest dot, counted from the top, of each column of dots with a value."""
        first, last = self.steps
        low, high = self.values
        across, down = self.columns * COLUMNS - 1, self.rows * ROWS - 1
        spans: dict[int, tuple[float, float]] = {}
        for point in points:
            x = round((point.last - first) / max(1, last - first) * across)
            top, bottom = ((high - value) / (high - low) * down for value in (point.high, point.low))
            was = spans.get(x, (top, bottom))
            spans[x] = min(was[0], top), max(was[1], bottom)
        return spans

    def _connect(self, a: tuple[int, float, float], b: tuple[int, float, float], style: str, marker: str) -> None:
        """Draw a line between the middles of two columns."""
        (x, *ends), (to, *others) = a, b
        start, stop = sum(ends) / 2, sum(others) / 2
        for column in range(x, to):
            y, following = (start + (stop - start) * (one - x) / (to - x) for one in (column, column + 1))
            self._fill(column, min(y, following), max(y, following), style, marker)

    def _fill(self, x: int, top: float, bottom: float, style: str, marker: str) -> None:
        column, bit = divmod(x, COLUMNS)
        for y in range(round(top), round(bottom) + 1):
            row, place = divmod(y, ROWS)
            if not 0 <= row < self.rows:
                continue
            self._styles[row][column] = style
            self._markers[row][column] = marker
            self._bits[row][column] |= DOTS[bit][place]


def bars(points: Sequence[CurvePoint], width: int, ascii_only: bool) -> str:
    """Return the newest `width` values of a curve as bars, from the lowest to the highest of them."""
    values = [point.high for point in points[-width:]] if width > 0 else []
    if not values or ascii_only:
        return ""
    low, high = min(values), max(values)
    if high <= low:
        return BARS[3] * len(values)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in values)


def heat_map(
    loads: Sequence[LoggedLoad], layer: Callable[[int], int], width: int, height: int, ascii_only: bool
) -> Text:
    """Draw the load of MoE layers (rows) at the newest logged steps (columns, the newest at the right).

    Layers that do not fit are merged with their neighbours: the busiest one is shown. `layer` names a layer.
    """
    label, rows = 5, height - 1
    columns = width - label
    if not loads or columns < 1 or rows < 1:
        return Text("no loads of experts yet" if not loads else "", "dim")
    shown, layers = list(loads)[-columns:], max(len(load.max_over_mean) for load in loads)
    size, repeat = math.ceil(layers / rows), min(5, max(1, rows // layers))
    text, shades = Text(), PLAIN_SHADES if ascii_only else SHADES
    for begin, again in product(range(0, layers, size), range(repeat)):
        text.append(f"{'' if again else f'L{layer(begin)}':<{label}.{label}}", "dim")
        for load in shown:
            group = load.max_over_mean[begin : begin + size]
            level = sum(max(group, default=0.0) >= limit for limit in LEVELS)
            dead = any(load.dead[begin : begin + size])
            text.append(DEAD if dead else shades[level], SHADE_STYLES[level])
        text.append("\n")
    first, last = f"step {shown[0].step:,}", f"{shown[-1].step:,}"
    room = min(columns, len(shown))
    axis = f"{first}{last:>{room - len(first)}}" if room > len(first) + len(last) else last
    text.append(f"{'':{label}}{axis}", "dim")
    return text


def heat_legend(ascii_only: bool) -> str:
    """Return what the shades of a heat map mean."""
    shades = PLAIN_SHADES if ascii_only else SHADES
    parts = [f"{shades[0]} <{LEVELS[0]:g}"]
    parts += [f"{shade} {limit:g}" for shade, limit in zip(shades[1:], LEVELS, strict=True)]
    return f"{' '.join(parts)}  {DEAD} an expert without a token"
