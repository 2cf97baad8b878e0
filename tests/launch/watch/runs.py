"""Make the files of a run in progress, for tests of `watch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.watch.run import WatchedRun
from launch.watch.screen import plain_frame
from launch.watch.view import View
from tests.train.report.runs import make_run

EVENT = {
    "time": 1.75e9,
    "step": 30,
    "event": "spike",
    "detector": "loss_mad",
    "statistics": {"loss": 9.31, "limit": 4.2},
    "verdict": "data",
    "action": "rewind to step 20",
}


def make_running(directory: Path, *overrides: str, **options: Any) -> Path:
    """Write the files of a run that has done 50 of its 60 steps."""
    run = make_run(directory, *overrides, **options)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 50]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (run / "summary.json").unlink()
    return run


def append(run: Path, name: str, *lines: dict[str, Any]) -> None:
    with (run / name).open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)


def logged(step: int, **values: Any) -> dict[str, Any]:
    """Return a line of metrics."""
    line = {"step": step, "tokens": step * 2048, "loss": 4.0, "tokens_per_second": 7000.0}
    return {**line, "learning_rate": 1e-3, "gradient_norm": 0.5, "peak_memory_bytes": 7e8, **values}


def viewed(*directories: Path, **values: Any) -> View:
    view = View([WatchedRun(directory) for directory in directories], **values)
    for run in view.runs:
        run.poll()
    return view


def frame(*directories: Path, width: int = 120, height: int = 40, **values: Any) -> str:
    return plain_frame(viewed(*directories, **values), width, height)
