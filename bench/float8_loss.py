"""Measure FP8 training loss: `python -m bench.float8_loss [--steps N] [--seeds N] [--picture PATH] [KEY=VALUE ...]`.

The smoke model is trained in bfloat16 and with emulated FP8 matmuls. For each seed, both runs have the same initial
weights and batches. The gap is the difference of their held-out losses relative to that of bfloat16. The upper end of
its one-sided 95% confidence interval over seeds (Student's t) must be at most 1%. The plot is written to `--picture`,
by default in docs/.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from core.plotting import COLOURS, figure, png
from train.run_directory import read_lines

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "fp8_loss.png"
SIDES = {"bf16": ["precision=bf16"], "FP8": ["precision=fp8", "precision.backend=emulated"]}
QUANTILE = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895}
"""One-sided 95% quantile of Student's t distribution, by the number of seeds."""
MOST_GAP = 0.01
EVERY = 25

Curve = dict[int, float]


def run(root: Path, name: str, overrides: list[str]) -> tuple[Curve, Curve]:
    """Train a run. Return its training loss and its held-out loss, each by step."""
    usual = [f"run.root={root}", f"run.name={name}", "logging.every=5", "logging.report=false", "checkpoint.every=0"]
    command = [sys.executable, "-m", "launch.cli", "train", "experiment=smoke", *usual, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = list(read_lines(root / name / "metrics.jsonl"))
    training = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return training, {line["step"]: line["heldout_loss"] for line in lines if "heldout_loss" in line}


def gaps(found: dict[str, list[tuple[Curve, Curve]]]) -> list[Curve]:
    """Return the gap of FP8's held-out loss relative to bfloat16's, by step, for each seed."""
    pairs = zip(found["bf16"], found["FP8"], strict=True)
    return [{step: eight[step] / plain[step] - 1 for step in plain} for (_, plain), (_, eight) in pairs]


def bound(values: list[float]) -> tuple[float, float]:
    """Return the mean and the upper end of its one-sided 95% interval."""
    mean = statistics.mean(values)
    return mean, mean + QUANTILE[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def draw(found: dict[str, list[tuple[Curve, Curve]]], steps: int, path: Path) -> None:
    with figure(9.6, 3.8, 1, 2) as (made, [losses, difference]):
        for (name, curves), colour in zip(found.items(), COLOURS, strict=False):
            for index, (_, held_out) in enumerate(curves):
                style: dict[str, Any] = {"color": colour, "linestyle": "-" if name == "bf16" else "--"}
                losses.plot(list(held_out), list(held_out.values()), label=None if index else name, **style)
        losses.set(xlabel="step", ylabel="held-out loss, nats per token", title=f"{len(found['FP8'])} seeds each")
        for seed, gap in enumerate(gaps(found)):
            percent = [100 * value for value in gap.values()]
            difference.plot(list(gap), percent, label=f"seed {seed}", color=COLOURS[2:][seed % 6])
        difference.axhline(0, color="black", linewidth=0.8)
        difference.axhline(100 * MOST_GAP, color=COLOURS[1], linestyle=":", label="allowed at the end")
        label = "held-out gap of FP8, % of bf16's loss"
        difference.set(xlabel="step", ylabel=label, title="paired by seed", xlim=(0, steps))
        for axes in (losses, difference):
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        path.write_bytes(png(made))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.float8_loss", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(QUANTILE))
    parser.add_argument("--picture", type=Path, default=PICTURE, help="file for the curves")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    chosen = parser.parse_args(arguments)
    found: dict[str, list[tuple[Curve, Curve]]] = {name: [] for name in SIDES}
    usual = [f"training.steps={chosen.steps}", f"evaluation.every={EVERY}", "evaluation.baselines=false"]
    print("| seed | bf16 | FP8 | gap |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for seed in range(chosen.seeds):
            for name, side in SIDES.items():
                overrides = [*usual, *side, f"run.seed={seed}", *chosen.overrides]
                found[name].append(run(Path(root), f"{name}-{seed}", overrides))
            plain, eight = (found[name][-1][1][chosen.steps] for name in SIDES)
            print(f"| {seed} | {plain:.4f} | {eight:.4f} | {eight / plain - 1:+.3%} |", flush=True)
    mean, upper = bound([gap[chosen.steps] for gap in gaps(found)])
    draw(found, chosen.steps, chosen.picture)
    figures = {
        "pairs": chosen.seeds,
        "steps": chosen.steps,
        "mean_gap": mean,
        "upper_bound": upper,
        "allowed": MOST_GAP,
    }
    print(json.dumps(figures))
    return 0 if upper <= MOST_GAP else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
