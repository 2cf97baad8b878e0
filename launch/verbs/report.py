"""The verb `report`: write an HTML page about one run, or about several side by side."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import ConfigError
from core.files import check_target, local_path

LONGEST_S = 86_400
"""Longest time between two pages."""


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
