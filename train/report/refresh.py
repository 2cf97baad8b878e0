"""Write a report again and again while its runs train."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from core.exit_codes import INTERRUPTED
from train.report.page import write_report
from train.report.run import NoStepYet
from train.signals import SignalFlag

POLL_S = 0.2
"""Seconds between two looks at whether Ctrl-C was pressed."""


def refresh_report(directories: Sequence[Path], out: Path, seconds: int) -> int:
    """Write the report every `seconds` until all runs have ended; return the exit code.

    Ctrl-C and SIGTERM end it earlier. The last page is written without the instruction to load it again.
    """
    announced = ""
    with SignalFlag() as interruption:
        while True:
            again = None if interruption.requested else seconds
            try:
                ended = write_report(directories, out, again)
                news = f"report: {out}" if ended else f"report: {out}, written again every {seconds} s; Ctrl-C ends it"
            except NoStepYet as error:
                ended, news = False, f"report: waits, because {error.value} {error.reason}"
            if news != announced and not interruption.requested:
                print(news, flush=True)
                announced = news
            if ended:
                return 0
            if again is None:
                return INTERRUPTED
            _wait(seconds, interruption)


def _wait(seconds: int, interruption: SignalFlag) -> None:
    """Wait, until an interruption at most."""
    end = time.monotonic() + seconds
    while not interruption.requested and (left := end - time.monotonic()) > 0:
        time.sleep(min(POLL_S, left))
