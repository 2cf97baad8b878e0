"""Define a row of results, the file that stores the rows, and their Markdown tables."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1


@dataclass(frozen=True)
class BenchRow:
    """One measurement; fields that do not apply are None."""

    section: str
    name: str
    """The matmul, layer or model, such as "Scout gate and up"."""
    side: str = ""
    """Implementation and precision: "bf16", "te blockwise", "transformers"."""
    phase: str = ""
    """"forward", "forward+backward", "step", "check", "copy"."""
    shape: dict[str, int | str] = field(default_factory=dict)
    tokens: int | None = None
    load: str | None = None
    """How tokens divide among experts: "balanced", "zipf" or "routed"."""
    ms: float | None = None
    """Median over repetitions, each after the L2 cache was overwritten."""
    spread: float | None = None
    """Half the interquartile range of the times over their median."""
    flops: float | None = None
    """Counted as in `model.flops`: 2 for a multiply-add, nothing for recomputation and the softmax."""
    tflops: float | None = None
    bytes: int | None = None
    """Smallest possible memory traffic: each input is read once and each output written once."""
    gb_per_s: float | None = None
    memory_bytes: int | None = None
    """Peak allocation on the device."""
    error: float | None = None
    """Norm of the difference over the norm of the reference: the largest one among outputs and gradients."""
    gate: float | None = None
    """Largest `error` that passes."""
    ratio: float | None = None
    against: str | None = None
    """What the denominator of `ratio` measures."""
    floor: float | None = None
    """Bound on `ratio`, or on `tflops` without a ratio: a lower bound, or an upper bound if `at_most`."""
    moonshot: float | None = None
    at_most: bool = False
    holds: bool | None = None
    missing: str | None = None
    """Why the row was not measured, such as a package to install."""
    failed: str | None = None
    note: str = ""

    @property
    def value(self) -> float | None:
        """The value to compare with `floor`."""
        return self.ratio if self.ratio is not None else self.tflops

    @property
    def is_bad(self) -> bool:
        return self.failed is not None or self.holds is False


def judged(row: BenchRow, dry: bool) -> BenchRow:
    """Return the row with `tflops` and `gb_per_s`, and with `holds` if it has a floor, except in a dry run."""
    fields = asdict(row)
    if row.ms and row.flops:
        fields["tflops"] = row.flops / row.ms / 1e9
    if row.ms and row.bytes:
        fields["gb_per_s"] = row.bytes / row.ms / 1e6
    value = BenchRow(**fields).value
    if row.floor is not None and value is not None and not dry:
        fields["holds"] = value <= row.floor if row.at_most else value >= row.floor
    return BenchRow(**fields)


class BenchRecord:
    """Keep the rows in a file, which is replaced atomically after every row."""

    def __init__(self, path: Path | None, dry: bool) -> None:
        self.path, self.dry, self.began = path, dry, time.monotonic()
        self.machine: dict[str, Any] = {}
        self.rows: list[BenchRow] = []

    def add(self, row: BenchRow) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        whole = {
            "schema": SCHEMA,
            "dry": self.dry,
            "machine": self.machine,
            "seconds": round(time.monotonic() - self.began, 1),
            "rows": [
                {key: value for key, value in asdict(row).items() if value not in (None, "")} for row in self.rows
            ],
        }
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(whole, indent=1) + "\n")
        temporary.replace(self.path)


def machine(device: torch.device) -> dict[str, Any]:
    """Return facts about this machine."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
    }
    for name in ("triton", "transformers", "transformer-engine", "torchtitan"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if device.type != "cuda":
        return found | {"device": "CPU"}
    about = torch.cuda.get_device_properties(device)
    return found | {
        "device": about.name,
        "memory_bytes": about.total_memory,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "l2_bytes": about.L2_cache_size,
        "driver": _driver(),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or None
    except (OSError, subprocess.TimeoutExpired):
        return None


HEADER = (
    "| what | side | phase | tokens | ms | TFLOP/s | GB/s | error | ratio | goal | holds | notes |\n"
    + "|---" * 12
    + "|"
)


def line(row: BenchRow) -> str:
    """Return the row as a line of a Markdown table."""
    size = f"{row.tokens:,}{', ' + row.load if row.load else ''}" if row.tokens else ""
    goal = ""
    if row.floor is not None:
        goal = f"{'<=' if row.at_most else '>='} {row.floor:g}, moonshot {row.moonshot:g}"
    holds = {True: "yes", False: "NO", None: ""}[row.holds]
    notes = [row.note, f"against {row.against}" if row.against else ""]
    notes += [f"missing: {row.missing}" if row.missing else "", f"FAILED: {row.failed}" if row.failed else ""]
    if row.memory_bytes:
        notes.insert(0, f"{row.memory_bytes / 2**30:.1f} GiB")
    if row.spread is not None and row.spread > 0.05:
        notes.append(f"spread {row.spread:.0%}")
    figures = [_short(row.ms), _short(row.tflops), _short(row.gb_per_s)]
    error = "" if row.error is None else f"{row.error:.1e}"
    cells = [row.name, row.side, row.phase, size, *figures, error, _short(row.ratio), goal, holds]
    return f"| {' | '.join([*cells, '; '.join(note for note in notes if note)])} |".replace("\n", " ")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def tables(rows: Iterable[BenchRow], facts: dict[str, Any], dry: bool) -> str:
    """Return tables for bench/RESULTS.md: first the goals and what failed, then each section."""
    rows = list(rows)
    mark = "**DRY RUN on a CPU with tiny shapes: these figures are meaningless.**\n\n" if dry else ""
    about = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None and key != "date")
    parts = [f"## {facts.get('date')}, `python -m bench.gpu`\n\n{mark}{about}"]
    goals = [row for row in rows if row.floor is not None or row.is_bad]
    if goals:
        parts.append("\n".join(["### Goals, and what failed", "", HEADER, *map(line, goals)]))
    for section in dict.fromkeys(row.section for row in rows):
        of_section = [line(row) for row in rows if row.section == section]
        parts.append("\n".join([f"### {section}{' (DRY)' if dry else ''}", "", HEADER, *of_section]))
    return "\n\n".join(parts) + "\n"
