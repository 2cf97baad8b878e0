"""Measure the seconds from the command to the first step of the smoke model, with and without a cached corpus."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import Result


def seconds_to_first_step(cache: Path, runs: Path) -> float:
    """Return the seconds until a run prints the line of step 1."""
    command = [sys.executable, "-m", "train", "logging.every=1", f"data.cache={cache}", f"run.root={runs}"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                elapsed = time.perf_counter() - begin
                process.kill()
                return elapsed
    raise AssertionError("the run ended before its first step")


def run() -> list[Result]:
    warm, cold = [], []
    with tempfile.TemporaryDirectory() as root:
        for number in range(5):
            cache = Path(root) / f"cache{number}"
            cold.append(seconds_to_first_step(cache, Path(root) / f"cold{number}"))
            warm.append(seconds_to_first_step(cache, Path(root) / f"warm{number}"))
    found = []
    for name, times in (("tokens in the cache", warm), ("nothing in the cache", cold)):
        median = statistics.median(times)
        note = f"median of {len(times)}, {min(times):.1f} to {max(times):.1f}; the second column is the floor"
        found.append(
            Result(f"command to first step, {name} (s)", median, 12.0, median / 12, "<= 1", median <= 12, note)
        )
    return found
