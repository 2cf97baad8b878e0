"""Readers of published measurements: one module per kind of table, recognised from its header."""

from __future__ import annotations

from pathlib import Path

from core.errors import ConfigError
from launch.plan.readers import megatron, nanotron, runs
from launch.plan.readers.common import Table, convert, read_rows

KINDS = {"megatron": megatron, "nanotron": nanotron, "runs": runs}


def open_table(path: Path) -> Table:
    """Return the jobs and measurements of a table. Raises `ConfigError` if its header is of no known kind."""
    header, rows = read_rows(path)
    for name, module in KINDS.items():
        if set(header) >= module.HEADER:
            return convert(rows, module.read, name)
    wanted = "; ".join(f"{name}: {', '.join(sorted(module.HEADER))}" for name, module in KINDS.items())
    raise ConfigError("validate", str(path), f"its header is of no known kind of table ({wanted})")
