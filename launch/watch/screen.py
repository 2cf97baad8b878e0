"""Show runs on the terminal until the user ends it, or print one frame."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.live import Live

from core.errors import ConfigError
from core.exit_codes import DONE, INTERRUPTED
from launch.watch.jobs import JobStates
from launch.watch.run import WatchedRun
from launch.watch.view import View
from train.signals import SignalFlag

POLL_S = 0.2
"""Seconds between two looks at the keyboard."""
ONCE = 100, 40
"""Columns of one printed frame without a terminal, and its lines."""
_KEYS = {b"\x1b[A": "up", b"\x1b[B": "down", b"\x1b[C": "right", b"\x1b[D": "left", b"\r": "enter", b"\n": "enter"}


class Keyboard:
    """Reads keys without waiting for Enter. Without a terminal there are none."""

    def __init__(self, number: int) -> None:
        self.number, self._open = number, os.isatty(number)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In the block, the terminal passes each key on and does not show it."""
        if not self._open:
            yield
            return
        before = termios.tcgetattr(self.number)
        try:
            tty.setcbreak(self.number)
            yield
        finally:
            termios.tcsetattr(self.number, termios.TCSADRAIN, before)

    def wait(self, seconds: float) -> str:
        """Return the key that is pressed within this time, or an empty text."""
        if not self._open:
            time.sleep(seconds)
            return ""
        if not select.select([self.number], [], [], seconds)[0]:
            return ""
        pressed = os.read(self.number, 8)
        self._open = bool(pressed)
        return _KEYS.get(pressed, pressed[:1].decode("ascii", "ignore"))


def watch(directories: Sequence[Path], jobs: Path, seconds: float, console: Console, keyboard: Keyboard) -> int:
    """Show the runs until `q` (returns 0) or a signal such as Ctrl-C (returns 130)."""
    view, states = View([WatchedRun(directory) for directory in directories]), JobStates(jobs, directories)
    if not console.is_terminal or console.is_dumb_terminal:
        raise ConfigError("once", False, "needs a terminal that can be drawn on", ["--once"])
    states.start()
    screen = Live(console=console, screen=True, auto_refresh=False)
    with SignalFlag() as interruption, keyboard.reading(), screen:
        try:
            while not interruption.requested:
                behind = poll(view, states)
                screen.update(view.frame(*console.size), refresh=True)
                end = time.monotonic() + (0.0 if behind else seconds)
                key = keyboard.wait(0.0)
                while not interruption.requested and not key and (left := end - time.monotonic()) > 0:
                    key = keyboard.wait(min(POLL_S, left))
                if key and not view.press(key):
                    return DONE
        finally:
            states.stop()
    return INTERRUPTED


def poll(view: View, states: JobStates) -> int:
    """Read what is new. Return the number of bytes that are still to be read."""
    for run in view.runs:
        run.poll()
    view.jobs = {str(run.directory): words for run in view.runs if (words := states.of(run.directory))}
    view.note = states.problem
    return sum(run.behind for run in view.runs)


def print_once(directories: Sequence[Path], jobs: Path, width: int | None) -> int:
    """Print one frame of plain text. `width`: its columns; None: those of the terminal, or 100."""
    for directory in directories:
        if not directory.exists():
            raise ConfigError("runs", str(directory), "no such directory")
    view, states = View([WatchedRun(directory) for directory in directories]), JobStates(jobs, directories)
    states.ask()
    while poll(view, states):
        pass
    print(plain_frame(view, width or terminal_width(), ONCE[1], sys.stdout.encoding or "utf-8"))
    return DONE


def plain_frame(view: View, width: int, height: int, encoding: str = "utf-8") -> str:
    """Return a frame without colours, escape sequences and spaces at the ends of lines."""
    out = StringIO()
    console = Console(file=out, width=width, height=height, color_system=None, legacy_windows=False)
    options = console.options.update(width=width, height=height)
    options.encoding = encoding
    for line in console.render_lines(view.frame(width, height), options):
        out.write("".join(segment.text for segment in line).rstrip() + "\n")
    return out.getvalue().rstrip("\n")


def terminal_width() -> int:
    """Return the columns of the terminal that standard output is, or the default."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or ONCE[0]
    except (OSError, ValueError):  # a file, a pipe or a test's stand-in
        return ONCE[0]
