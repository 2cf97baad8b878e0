"""Time functions in turn, A B B A A B ..., so that a drift of the machine's speed affects all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Result:
    """One comparison. `ratio`: our time over theirs, unless `name` says otherwise. `floor`: the limit for `ratio`."""

    name: str
    ours: float
    theirs: float
    ratio: float
    floor: str
    holds: bool
    note: str

    @property
    def row(self) -> str:
        verdict = "yes" if self.holds else "NO"
        figures = f"{self.ours:.4g} | {self.theirs:.4g} | {self.ratio:.3f}"
        return f"| {self.name} | {figures} | {self.floor} | {verdict} | {self.note} |"


HEADER = "| what | ours | theirs | ratio | floor | holds | how |\n|---|---|---|---|---|---|---|"


def interleaved(
    sides: Sequence[Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Return the seconds of each side in each round, after `warmup` discarded rounds. The order alternates. Use
    `time.process_time` as the clock where other work runs on the machine.
    """
    times: list[list[float]] = [[] for _ in sides]
    for round_ in range(-warmup, rounds):
        order = range(len(sides)) if round_ % 2 else reversed(range(len(sides)))
        for i in order:
            begin = clock()
            sides[i]()
            if round_ >= 0:
                times[i].append(clock() - begin)
    return times


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median over rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def spread(values: Sequence[float]) -> float:
    """Return the relative noise of the rounds: half the interquartile range over the median."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)


def machine() -> str:
    """Return a line that describes this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{name}, {os.cpu_count()} cores, {device}, {versions}, load {load:.1f}"
