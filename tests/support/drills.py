"""Start runs as processes that tests kill or stop, wait for a step, and read their losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.tiny import TINY

BIN = Path(sys.executable).parent
STEPS = 100
RUN = [
    f"training.steps={STEPS}",
    "logging.every=1",
    "checkpoint.every=20",
    "evaluation.sequences=2",
    "logging.report=false",
]
STARTED: list[subprocess.Popen[str]] = []
TWO_RANKS = ["launch=torchrun", "launch.processes=2", "parallel.ep=2"]


def start(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    line = [str(BIN / "leviathan"), "train", *TINY, *RUN, *arguments]
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    STARTED.append(subprocess.Popen(line, cwd=cwd, stdout=pipe, stderr=pipe, text=True, env=environment))
    return STARTED[-1]


def kill_started() -> None:
    """Kill what a failed test left running."""
    for process in STARTED:
        if process.poll() is None:
            for rank in ranks_of(process):
                os.kill(rank, signal.SIGKILL)  # the agent's end does not end a stopped rank
            process.kill()
    STARTED.clear()


def figures(run: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines if "loss" in line}


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"--config" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def has_step(run: Path, step: int) -> Callable[[], bool]:
    return lambda: (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text()


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait until the process ends with exit code `code`; return its stderr."""
    _, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    return errors
