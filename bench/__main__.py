"""Run side-by-side measurements, each in a separate process: `python -m bench [NAME ...] [--record]`.

A new process keeps allocator state and thread counts of one measurement out of the next. `--record` appends the results
to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.measure import HEADER, Result, machine

NO_REMAPPING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Environment variables that keep glibc from returning large freed blocks to the system, only to map them again in
the next step.
"""

BENCHES: dict[str, tuple[str, dict[str, str]]] = {
    "trainer_step": ("bench.trainer_step:run", {}),
    "moe_layer": ("bench.moe_layer:run", {}),
    "moe_growth": ("bench.moe_layer:run_growth", {}),
    "moe_growth_tuned": ("bench.moe_layer:run_growth", NO_REMAPPING),
    "loading": ("bench.data.loading:run", {}),
    "checkpoint": ("bench.run.checkpoint:run", {}),
    "offload": ("bench.run.offload:run", {}),
    "bubble": ("bench.pipeline.bubble:run", {}),
    "startup": ("bench.run.startup:run", {}),
    "images": ("bench.vision.images:run", {}),
    "vision_encoder": ("bench.vision.encoder:run", {}),
    "filtering": ("bench.data.filtering:run", {}),
    "selection": ("bench.data.selection:run", {}),
    "generation": ("bench.run.generation:run", {}),
}
RESULTS = Path(__file__).with_name("RESULTS.md")


def child(name: str) -> None:
    """Run one benchmark in this process and print its results as JSON lines."""
    module, _, function = BENCHES[name][0].partition(":")
    for result in getattr(importlib.import_module(module), function)():
        print("RESULT " + json.dumps(dataclasses.asdict(result)), flush=True)


def run(name: str) -> list[Result]:
    """Run one benchmark in a new process."""
    command, found = [sys.executable, "-m", "bench", "--child", name], []
    environment = {**os.environ, **BENCHES[name][1]}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("RESULT "):
                found.append(Result(**json.loads(line.removeprefix("RESULT "))))
                print(found[-1].row, flush=True)
    if process.returncode:
        raise SystemExit(f"benchmark {name} failed with exit code {process.returncode}")
    return found


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        child(arguments[1])
        return 0
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure side by side and print a table.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"benchmarks to run: {', '.join(BENCHES)} (default: all)"
    )
    parser.add_argument("--record", action="store_true", help=f"append the table to bench/{RESULTS.name}")
    chosen = parser.parse_args(arguments)
    names = chosen.names or list(BENCHES)
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHES)}")
    title = f"{time.strftime('%Y-%m-%d')}, `{' '.join(['python -m bench', *chosen.names])}`, {machine()}"
    print(f"{title}\n\n{HEADER}", flush=True)
    results = [result for name in names for result in run(name)]
    if chosen.record:
        table = "\n".join([HEADER, *(result.row for result in results)])
        with open(RESULTS, "a") as file:
            file.write(f"\n## {title}\n\n{table}\n")
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
