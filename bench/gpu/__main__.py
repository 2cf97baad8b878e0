"""Run the command that `bench.gpu` describes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer

import torch

import bench.gpu
from bench.gpu import attention, checks, head, kernels, layers, products, training
from bench.gpu.context import Bench, BenchJob
from bench.gpu.record import BenchRecord, BenchRow, judged, machine, tables

SECTIONS: dict[str, Callable[[Bench], Iterator[BenchJob]]] = {
    "tests": checks.checks,
    "ceilings": products.ceilings,
    "kernels": kernels.kernels,
    "step": training.step,
    "layers": layers.layers,
    "attention": attention.attention,
    "head": head.head,
    "loss": training.loss,
    "dense": products.dense,
    "grouped": products.grouped,
}
"""Jobs by section, tests and then the most important sections first: if time runs out, the last are skipped."""
GRACE_S = 60
"""Seconds after the deadline in which a section may finish a row, before its process is killed."""


def measure(name: str, bench: Bench) -> Iterator[BenchRow]:
    """Yield the rows of a section. A job that raises gives a failed row, a job without time left a missing row."""
    for job in SECTIONS[name](bench):
        if bench.is_over:
            yield BenchRow(name, job.name, missing="time: raise --minutes")
            continue
        print(f"  {name}: {job.name}", file=sys.stderr, flush=True)
        try:
            for row in job.measure():
                yield judged(row, bench.dry)
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines()
            yield BenchRow(name, job.name, failed=f"{type(error).__name__}: {said[0] if said else ''}"[:300])
        bench.clear()


def child(name: str, bench: Bench) -> None:
    """Run one section in this process. Print the facts about the machine and each row as lines of JSON."""
    print("MACHINE " + json.dumps(machine(bench.device)), flush=True)
    for row in measure(name, bench):
        print("ROW " + json.dumps(dataclasses.asdict(row)), flush=True)


def in_new_process(name: str, seconds: float, record: BenchRecord) -> Iterator[BenchRow]:
    """Run one section in a new process; a crash becomes a failed row."""
    command = [sys.executable, "-m", "bench.gpu", "--child", name, "--minutes", str(max(seconds, 0) / 60)]
    command += ["--dry"] if record.dry else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        limit = Timer(max(seconds, 0) + GRACE_S, process.kill)
        limit.start()
        assert process.stdout is not None
        for text in process.stdout:
            kind, _, value = text.partition(" ")
            if kind == "MACHINE":
                record.machine = json.loads(value)
            elif kind == "ROW":
                yield BenchRow(**json.loads(value))
        code = process.wait()
        limit.cancel()
    if code:
        late = " at the time limit" if code == -9 else ""
        yield BenchRow(name, "the section", failed=f"its process ended with {code}{late}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(bench.gpu.__doc__ or "").split("\n\n")[1])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"sections: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"), help="file for the results (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no job after this time (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, to test the code")
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    if not chosen.dry and not torch.cuda.is_available():
        print(
            "bench.gpu needs a GPU that PyTorch can use and found none (--dry tests the code on a CPU)",
            file=sys.stderr,
        )
        return 1
    deadline = time.monotonic() + 60 * chosen.minutes
    device = torch.device("cpu") if chosen.dry else torch.device("cuda", 0)
    if chosen.child:
        child(chosen.child, Bench(device, chosen.dry, deadline))
        return 0
    record = BenchRecord(chosen.out, chosen.dry)
    if chosen.dry:
        record.machine = machine(device)
    for name in chosen.names or SECTIONS:
        print(f"{name}, {deadline - time.monotonic():.0f} s left", file=sys.stderr, flush=True)
        if chosen.dry:
            rows = measure(name, Bench(device, True, deadline))
        else:
            rows = in_new_process(name, deadline - time.monotonic(), record)
        for row in rows:
            record.add(row)
    print(tables(record.rows, record.machine, chosen.dry))
    return 1 if any(row.is_bad for row in record.rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
