"""One picture of one run, or of several side by side.

All text goes through `core.errors.printable`, and none is read as rich's markup: files of a run may hold anything.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from core.errors import printable
from launch.watch.curve import CurvePoint, MetricCurve
from launch.watch.plot import Drawing, PlotSeries, bars, heat_legend, heat_map, plot
from launch.watch.run import RunState, WatchedRun, number

STATE_STYLES = {
    RunState.missing: "dim",
    RunState.starting: "yellow",
    RunState.running: "bold green",
    RunState.silent: "bold yellow",
    RunState.finished: "bold cyan",
    RunState.diverged: "bold red",
}
RUN_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red", "white")
ZOOMS = {"the whole run": 1.0, "its last half": 0.5, "its last tenth": 0.1}
NARROW, LOW = 90, 34
"""Columns below which panels are stacked, and lines below which the log is omitted."""
LONGEST_TEXT = 400
"""Characters of a text from a file that are shown."""


@dataclass
class View:
    """What is shown: the runs, the one that is selected, whether it is shown alone, and the part of the steps."""

    runs: Sequence[WatchedRun]
    jobs: dict[str, str] = field(default_factory=dict)
    """Words about the SLURM job of each run, by the run's directory."""
    note: str = ""
    """A sentence about what could not be found out."""
    selected: int = 0
    alone: bool = False
    zoom: int = 0

    def press(self, key: str) -> bool:
        """Change what is shown. Return False for the key that ends the view."""
        count = len(self.runs)
        match key:
            case "q":
                return False
            case "down" | "right" | "\t" | "j":
                self.selected = (self.selected + 1) % count
            case "up" | "left" | "k":
                self.selected = (self.selected - 1) % count
            case "enter":
                self.alone = not self.alone
            case "z":
                self.zoom = (self.zoom + 1) % len(ZOOMS)
            case _ if key.isdecimal() and 1 <= int(key) <= count:
                self.selected, self.alone = int(key) - 1, True
        return True

    def frame(self, width: int, height: int) -> Layout:
        """Return the picture for a terminal of this size."""
        run = self.runs[self.selected]
        if len(self.runs) == 1 or self.alone:
            return self._of_one(run, width, height)
        return self._of_all(run, width, height)

    def _of_one(self, run: WatchedRun, width: int, height: int) -> Layout:
        loss = self._loss([run])
        figures = Panel(Figures(run), title=Text("now"), border_style="dim")
        alarms = self._alarms([run])
        rows = [Layout(self._header(run), size=2)]
        if width < NARROW:
            rows += [Layout(loss, ratio=3), Layout(figures, size=12)]
            rows += [Layout(_heat(run), ratio=2), Layout(alarms, ratio=2)]
        else:
            rows += [_beside((loss, 3), (figures, 2), ratio=3), _beside((_heat(run), 1), (alarms, 1), ratio=2)]
        if height >= LOW:
            rows.append(Layout(_log(run), size=6))
        return _column([*rows, Layout(self._footer(), size=1)])

    def _of_all(self, run: WatchedRun, width: int, height: int) -> Layout:
        shown = min(len(self.runs), max(1, height // 3))
        first = min(max(0, self.selected - shown // 2), len(self.runs) - shown)
        states = Counter(one.state.value for one in self.runs)
        title = f"{len(self.runs)} runs: " + ", ".join(f"{count} {state}" for state, count in states.items())
        rows = [Layout(_text(title, "bold"), size=1), Layout(self._table(first, shown, width), size=shown + 2)]
        loss, alarms = self._loss(self.runs), self._alarms(self.runs)
        if width < NARROW:
            rows += [Layout(loss, ratio=2), Layout(_heat(run), ratio=1), Layout(alarms, ratio=1)]
        else:
            rows += [Layout(loss, ratio=3), _beside((_heat(run), 1), (alarms, 1), ratio=2)]
        return _column([*rows, Layout(self._footer(), size=1)])

    def _header(self, run: WatchedRun) -> RenderableType:
        """Two lines: the state and the progress."""
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{run.state.value} ", STATE_STYLES[run.state])
        line.append(_shown(run.name), "bold")
        if run.state is RunState.silent:
            line.append(f"  wrote nothing for {duration(run.quiet_s)}", "yellow")
        if run.behind:
            line.append(f"  reading metrics.jsonl: {run.metrics.offset / max(1, run.metrics.size):.0%}", "yellow")
        if job := self.jobs.get(str(run.directory)):
            line.append(f"  {_shown(job)}")
        return Group(line, Progress(run))

    def _table(self, first: int, shown: int, width: int) -> RenderableType:
        table = Table(box=None, expand=True, pad_edge=False, header_style="dim", show_edge=False)
        names = ["", "", "run", "state", "step", "loss", "held-out"]
        names += ["tok/s", "|g|", "lr", "memory", "left", "job"] if width >= NARROW else ["left"]
        for name in names:
            right = name not in ("", "run", "state", "job")
            ratio = 1 if name == "run" else None
            table.add_column(name, no_wrap=True, overflow="ellipsis", justify="right" if right else "left", ratio=ratio)
        for place, run in list(enumerate(self.runs))[first : first + shown]:
            curves = run.curves
            style = RUN_STYLES[place % len(RUN_STYLES)]
            step = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
            cells = [
                _text(">" if place == self.selected else "", style),
                _text(_marker(place), style),
                _text(run.name, style),
                _text(run.state.value, STATE_STYLES[run.state]),
                _text(step),
                _text(_figure(curves["loss"].value, ".4f")),
                _text(_figure(run.held_out.value, ".4f")),
            ]
            left = _text("" if run.left_s is None else duration(run.left_s))
            if width >= NARROW:
                cells += [
                    _text(_figure(curves["tokens_per_second"].value, ",.0f")),
                    _text(_figure(curves["gradient_norm"].value, ".3f")),
                    _text(_figure(curves["learning_rate"].value, ".2e")),
                    _text(memory(curves["peak_memory_bytes"].value)),
                    left,
                    _text(self.jobs.get(str(run.directory), "")),
                ]
            else:
                cells.append(left)
            table.add_row(*cells)
        return table

    def _loss(self, runs: Sequence[WatchedRun]) -> Panel:
        zoom = list(ZOOMS)[self.zoom]
        steps = max((run.step for run in runs), default=0)
        start = steps * (1 - ZOOMS[zoom])
        series, sparse, title = [], [], Text()
        for run in runs:
            place = list(self.runs).index(run)
            style = RUN_STYLES[place % len(RUN_STYLES)]
            series.append(PlotSeries(list(run.curves["loss"].since(start)), style, _marker(place)))
            if points := list(run.held_out.since(start)):
                bright = f"bold {style if len(runs) > 1 else 'white'}"
                sparse.append(PlotSeries(points, bright, "o", is_sparse=True))
            if len(runs) > 1:
                title.append(f" {_marker(place)} {_shown(run.name, 20)}", style)
        longest_first = sorted(series, key=lambda one: -one.points[-1].last if one.points else 0)
        drawn = [*longest_first, *sparse]  # a short curve stays visible on a long one
        heading = Text(f"loss, {zoom}").append_text(title)
        if sparse:
            heading.append("  o held-out", "bold")
        heading.no_wrap = True
        return Panel(Drawing(lambda *size: plot(drawn, *size)), title=heading, border_style="dim")

    def _alarms(self, runs: Sequence[WatchedRun]) -> Panel:
        alarms, events = [], []
        for run in runs:
            prefix = f"{_shown(run.name, 20)}: " if len(runs) > 1 else ""
            alarms += [Text(_shown(f"! {prefix}{one}"), "bold red") for one in run.alarms()]
            events += [Text(_shown(f"{prefix}{describe(event)}")) for event in reversed(run.events)]
        if self.note:
            alarms.append(_text(self.note, "yellow"))
        title = f"alarms: {len(alarms)}" + (f", ledger: {len(events)}" if events else "")
        lines = [*(alarms or [Text("no alarms", "green")]), *events]
        return Panel(Group(*lines), title=Text(title), border_style="red" if alarms else "dim")

    def _footer(self) -> Text:
        several = "up/down: another run  enter: it alone, or all  " if len(self.runs) > 1 else ""
        return Text(f"q: end  z: zoom  {several}".rstrip(), "dim", no_wrap=True, overflow="ellipsis")


class Progress:
    """A bar of the steps that are done, with the time left."""

    def __init__(self, run: WatchedRun) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        run, steps = self.run, self.run.steps
        words = f"step {run.step:,}" + (f" of {steps:,}  {run.step / steps:.0%}" if steps else "")
        if (left := run.left_s) is not None and run.state is not RunState.finished:
            words += f"  {duration(left)} left"
        room = options.max_width - len(words) - 2
        done = round(room * min(1.0, run.step / steps)) if steps and room > 0 else 0
        full, empty = "#-" if options.ascii_only else "━╌"
        line = Text(f"{words}  ", no_wrap=True, overflow="crop")
        yield line.append(full * done, "green").append(empty * max(0, room - done), "dim")


class Figures:
    """The newest values of a run, each with bars of its last values."""

    def __init__(self, run: WatchedRun) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        curves, last = self.run.curves, self.run.last
        rows: list[tuple[str, str, MetricCurve | None]] = [
            ("loss", _figure(curves["loss"].value, ".4f"), curves["loss"]),
            ("held-out loss", _figure(self.run.held_out.value, ".4f"), self.run.held_out),
            ("gradient norm", _figure(curves["gradient_norm"].value, ".3f"), curves["gradient_norm"]),
            ("learning rate", _figure(curves["learning_rate"].value, ".2e"), curves["learning_rate"]),
            ("tokens/s", _figure(curves["tokens_per_second"].value, ",.0f"), curves["tokens_per_second"]),
            ("MFU", _figure(curves["mfu"].value, ".1%"), curves["mfu"]),
            ("peak memory", memory(curves["peak_memory_bytes"].value), curves["peak_memory_bytes"]),
            ("tokens", _figure(number(last.get("tokens")), ",.0f"), None),
            ("waits for data", _seconds(number(last.get("data_wait_s"))), None),
        ]
        table = Table.grid(padding=(0, 1, 0, 0))
        for justify in ("left", "right", "left"):
            table.add_column(justify=justify, no_wrap=True, overflow="crop")
        room = options.max_width - 15 - max(len(value) for _, value, _ in rows) - 3
        for name, value, curve in rows:
            if value != "-" or name in ("loss", "tokens/s"):
                points: list[CurvePoint] = [] if curve is None else curve.points
                recent = bars(points, room, options.ascii_only)
                table.add_row(Text(name, "dim"), Text(value, "bold"), Text(recent, "cyan"))
        yield table


def describe(event: dict[str, Any]) -> str:
    """Return a line about an event of the ledger."""
    when = number(event.get("time"))
    try:
        clock = time.strftime("%m-%d %H:%M:%S", time.localtime(when))
    except (ValueError, OverflowError, OSError):  # NaN, or no year that a clock knows
        clock = "-"
    step, statistics = event.get("step"), _words(event.get("statistics"))
    where = f"{clock} step {step:,}" if isinstance(step, int) else clock
    detector = _words(event.get("detector")) + (f" ({statistics})" if statistics else "")
    parts = [", ".join(filter(None, (_words(event.get("event")), detector)))]
    parts += [f"{name}: {words}" for name in ("verdict", "action") if (words := _words(event.get(name)))]
    return f"{where}: {'; '.join(filter(None, parts))}"


def _words(value: Any) -> str:
    """Return a value of the ledger on one line."""
    match value:
        case None:
            return ""
        case dict():
            return ", ".join(f"{key} {_words(part)}" for key, part in list(value.items())[:8])
        case list():
            return " ".join(map(_words, value[:8]))
        case float():
            return f"{value:.4g}"
    return _shown(str(value), 120)


def duration(seconds: float) -> str:
    """Return a time for people: 0:42, 3 h 05 min, 2 d 4 h."""
    if not seconds < 1e9:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, left = divmod(hours, 24)
    if days:
        return f"{days} d {left} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d}"


def memory(size: float) -> str:
    """Return a number of bytes for people."""
    return "-" if not math.isfinite(size) else f"{size / 2**30:.2f} GiB"


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f} s"


def _figure(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _marker(place: int) -> str:
    """Return the character of a run in plots without colours."""
    return "123456789abcdefghijkmnpqrstuvwxyz"[place % 33]


def _shown(text: str, longest: int = LONGEST_TEXT) -> str:
    line = printable(text[: 4 * longest])
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _text(text: str, style: str = "") -> Text:
    return Text(_shown(text), style, no_wrap=True, overflow="ellipsis")


def _heat(run: WatchedRun) -> Panel:
    def draw(width: int, height: int, colour: bool, ascii_only: bool) -> Text:
        drawn = heat_map(run.loads, run.layer, width, height - 1, ascii_only)
        return drawn.append(f"\n{heat_legend(ascii_only)}", "dim") if run.loads and height > 2 else drawn

    title = f"expert load: busiest over mean, {_shown(run.name, 20)}"
    return Panel(Drawing(draw), title=Text(title, no_wrap=True), border_style="dim")


def _log(run: WatchedRun) -> Panel:
    lines: Iterable[str] = run.log[-4:]
    return Panel(Group(*map(_text, lines)), title=Text("log"), border_style="dim")


def _beside(*parts: tuple[RenderableType, int], ratio: int) -> Layout:
    """Return panels side by side, each with its share of the width."""
    layout = Layout(ratio=ratio)
    layout.split_row(*(Layout(part, ratio=share) for part, share in parts))
    return layout


def _column(rows: Sequence[Layout]) -> Layout:
    layout = Layout()
    layout.split_column(*rows)
    return layout
