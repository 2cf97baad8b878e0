"""The verb `report`: write an HTML page about one run, or about several side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from core.errors import ConfigError
from core.files import local_path


@dataclass(frozen=True)
class ReportConfig:
    """Write an HTML page about one run, or about several side by side."""

    runs: list[str] = field(default_factory=list)
    """Directories of runs."""
    out: str | None = None
    """File for the page; null: report.html in the run's directory, or in the current one for several runs."""


def run(config: ReportConfig) -> int:
    """Write the page and print its path."""
    from train.report.page import PAGE, write_report

    if not config.runs:
        raise ConfigError("runs", None, "name at least one run's directory: leviathan report RUN")
    directories = [Path(directory).expanduser() for directory in config.runs]
    out = local_path("out", config.out) if config.out else (directories[0] if len(directories) == 1 else Path()) / PAGE
    write_report(directories, out)
    print(f"report: {out}")
    return 0
