"""The verbs `report` and `watch`: show one run, or several side by side, on an HTML page or on the terminal."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import ConfigError
from core.files import check_target, local_path

LONGEST_S = 86_400
"""Longest time between two pages, or two looks at the files."""
WIDEST = 1000
"""Most columns of a frame."""


@dataclass(frozen=True)
class ReportConfig:
    """Write an HTML page about one run, or about several side by side."""

    runs: list[str] = field(default_factory=list)
    """Directories of runs."""
    out: str | None = None
    """File for the page; null: report.html in the run's directory, or in the current one for several runs."""
    refresh: int | None = None
    """Seconds after which the page is written again, until the runs end or Ctrl-C; null: write it once."""

    def __post_init__(self) -> None:
        if self.refresh is not None and not 1 <= self.refresh <= LONGEST_S:
            raise ConfigError("refresh", self.refresh, f"must be 1 to {LONGEST_S:,} seconds, or null", [30])


@dataclass(frozen=True)
class WatchConfig:
    """Show one run, or several, on the terminal while they train. Only reads their files."""

    runs: list[str] = field(default_factory=list)
    """Directories of runs. One that does not exist yet is waited for."""
    once: bool = False
    """Print one frame as plain text and end; `--once` for short."""
    width: int | None = None
    """Columns of the frame of `once`; null: those of the terminal, or 100."""
    seconds: float = 2.0
    """Seconds between two looks at the files."""
    jobs: str = "jobs"
    """Folder of the SLURM jobs, as in launch.slurm.directory."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.seconds <= LONGEST_S:
            raise ConfigError("seconds", self.seconds, f"must be 0.1 to {LONGEST_S:,}", [2])
        if self.width is not None and not 20 <= self.width <= WIDEST:
            raise ConfigError("width", self.width, f"must be 20 to {WIDEST:,} columns, or null", [100])


def run_watch(config: WatchConfig) -> int:
    """Show the runs until the user ends the view, or print one frame."""
    from rich.console import Console

    from launch.watch.screen import Keyboard, print_once, watch

    if not config.runs:
        raise ConfigError("runs", None, "name at least one run's directory: leviathan watch RUN")
    directories = [local_path("runs", directory) for directory in config.runs]
    jobs = local_path("jobs", config.jobs)
    if config.once:
        return print_once(directories, jobs, config.width)
    return watch(directories, jobs, config.seconds, Console(), Keyboard(0))


def run(config: ReportConfig) -> int:
    """Write the page and print its path."""
    from train.report.page import PAGE, write_report
    from train.report.refresh import refresh_report

    if not config.runs:
        raise ConfigError("runs", None, "name at least one run's directory: leviathan report RUN")
    directories = [Path(os.path.expanduser(directory)) for directory in config.runs]
    default = (directories[0] if len(directories) == 1 else Path()) / PAGE
    out = default if config.out is None else local_path("out", config.out)
    if config.out is not None:
        check_target("out", config.out, ".html")
    if config.refresh is not None:
        return refresh_report(directories, out, config.refresh)
    write_report(directories, out)
    print(f"report: {out}")
    return 0
