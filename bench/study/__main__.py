"""Run or resume the study: `python -m bench.study [--seeds 5] [--large | --quick] [--report] [--out FOLDER]`.

Runs are in the order of seeds, so that the table is complete for the seeds that are done. Each run is stored as a line
of `runs.jsonl` when it ends, and a stored run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.study.arms import EXAM_EACH, Cell, check_fair, draw, training_problems
from bench.study.report import write_report
from bench.study.tasks import FAMILIES, MAX_STEPS
from bench.study.training import SIZES, answered, train_model

RUNS = "runs.jsonl"
MIXES = (0.3, 0.5, 0.8)
GRID = tuple(Cell(easy, trained, epochs) for easy in MIXES for trained, epochs in ((1920, 1), (3840, 1), (3840, 8)))
LARGE = tuple(Cell(easy, 1920, 1, "5M") for easy in (0.3, 0.8))
QUICK = (Cell(0.5, 96, 1), Cell(0.5, 192, 2))


def done(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return the stored runs by cell, arm and seed. A last line that a killed study left unfinished is ignored."""
    found = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            row = json.loads(line)
            found[row["cell"], row["arm"], row["seed"]] = row
    return found


def missing(grid: Sequence[Cell], seeds: int, path: Path) -> Iterator[tuple[int, Cell, list[str]]]:
    """Yield seed, cell and arms without a stored run."""
    stored = done(path)
    for seed in range(seeds):
        for cell in grid:
            if arms := [arm for arm in cell.arms if (cell.name, arm, seed) not in stored]:
                yield seed, cell, arms


def study(grid: Sequence[Cell], seeds: int, out: Path) -> None:
    """Train and examine every arm that has no stored run."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / RUNS
    if path.exists():  # drop a line that a killed study left unfinished
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(whole))
    left = sum(len(arms) for _, _, arms in missing(grid, seeds, path))
    for seed, cell, arms in missing(grid, seeds, path):
        found = draw(cell, seed)
        chosen = {arm: training_problems(cell, found, arm, seed) for arm in arms}
        check_fair(cell, found, chosen)
        for arm, order in chosen.items():
            begin = time.perf_counter()
            right = answered(train_model(order, SIZES[cell.size], seed), found.exam)
            row = {
                "cell": cell.name,
                "arm": arm,
                "seed": seed,
                "right": right.reshape(len(FAMILIES), MAX_STEPS, EXAM_EACH).sum(2).tolist(),
                "mean_steps": sum(one.label for one in order) / len(order),
                "area": found.area.get(arm),
                "seconds": round(time.perf_counter() - begin, 1),
            }
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            left -= 1
            print(f"{cell.name} seed {seed} {arm}: {right.mean():.3f}, {row['seconds']} s, {left} left", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description="Study what filtering is worth.")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--quick", action="store_true", help="two tiny cells, to try the study itself")
    parser.add_argument("--large", action="store_true", help="models of 5 million parameters, two mixes, two arms")
    parser.add_argument("--report", action="store_true", help="train nothing: write the table of the stored runs")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of runs and table")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    grid = QUICK if chosen.quick else LARGE if chosen.large else GRID
    if not chosen.report:
        study(grid, chosen.seeds, chosen.out)
    print(write_report(done(chosen.out / RUNS), grid, chosen.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
