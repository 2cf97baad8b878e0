"""Print the table of docs/plan.md: python -m bench.plan.table FOLDER, where FOLDER holds the published tables.

Each line is a report of `leviathan plan validate=...`. Rows of fitted and of held-out sources are also reported apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.plan.fit import SPLIT
from launch.plan.calibration import default_calibration
from launch.plan.readers import open_table
from launch.plan.readers.common import Measured, Table
from launch.plan.validate import predict_all, report

FILES = ("runs", "simumax_b200", "nanotron_h100_sweep", "megatron_peak_memory")


def is_fitted(name: str, row: Measured) -> bool:
    """Return whether a constant may have seen this row."""
    match name:
        case "runs":
            return row.source in SPLIT["runs"]
        case "simumax_b200":
            return row.job.shapes.experts is None
        case "nanotron_h100_sweep":
            return row.job.shapes.hidden in SPLIT["nanotron_hidden_sizes"]
        case _:
            return row.job.gpu.name.lower().startswith(tuple(SPLIT["megatron_gpus"]))


def line(name: str, content: dict[str, Any], skipped: int | str) -> str:
    """Return a report as a row of the table."""
    time, memory, fits, regret = (content[key] for key in ("time", "memory", "fits", "regret"))
    cells = [
        name,
        _errors(time, lambda scores: f"{scores['median_error']:.1%} / {scores['mean_error']:.1%} ({scores['n']})"),
        _errors(memory, lambda scores: f"{scores['mean_error']:.1%}, {-scores['worst_under']:.1%} ({scores['n']})"),
        "" if fits["balanced_accuracy"] is None else f"{fits['balanced_accuracy']:.1%} ({fits['n']})",
        "" if not regret["groups"] else f"{regret['mean']:.1%}, {regret['worst']:.1%} ({regret['groups']})",
        str(skipped),
    ]
    return f"| {' | '.join(cells)} |"


def _errors(scores: dict[str, Any], show: Callable[[dict[str, Any]], str]) -> str:
    return show(scores) if scores["n"] else ""


def main(folder: Path) -> None:
    calibration = default_calibration()
    print("| table | step time: median / mean error (rows) | memory: mean error, lowest | fits | layouts | skipped |")
    print("|---|---|---|---|---|---|")
    for name in FILES:
        table = open_table(folder / f"{name}.csv")
        predictions = predict_all(table, calibration)
        print(line(f"`{name}.csv`", report(table, predictions), len(table.skipped)))
        for label, fitted in (("fitted sources", True), ("held-out sources", False)):
            part = [one for one in predictions if is_fitted(name, one.row) == fitted]
            print(line(f"- {label}", report(Table(name), part), ""))
        rival = report(table, predictions)["rival"]
        if rival["time"]["n"]:
            nothing = {
                "fits": {"balanced_accuracy": None, "n": 0},
                "regret": {"mean": None, "worst": None, "groups": 0},
            }
            print(line("- SimuMax itself", rival | nothing, ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
