"""Compare the training of text with another checkout of this repository: `python -m bench.checkouts DIRECTORY`.

A process per checkout trains the smoke model on the built-in text with one thread. The two take turns of a few steps,
so that a drift of the machine's speed affects both alike. Their losses are compared to the bit.

Use the CPU's time where other work runs on the machine, and wall time on a quiet one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench.measure import HEADER, Result, machine, median_ratio, spread

STEPS, LIMIT = 4, 1.01
WORKER = """
import sys, tempfile, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from bench.trainer_step import make_trainer
with tempfile.TemporaryDirectory() as root:
    trainer = make_trainer(Path(root), "run")
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [trainer.train_step(trainer.step).loss for _ in range(int(line))]
        losses = [loss.item() for loss in losses]
        print("TURN", time.perf_counter() - wall, time.process_time() - cpu, *losses, flush=True)
"""
HERE = Path(__file__).resolve().parent.parent


class Side:
    """A process that trains with the code of a checkout. `turns`: wall and CPU seconds of each turn."""

    def __init__(self, checkout: Path) -> None:
        self.turns: list[tuple[float, float]] = []
        own = checkout / ".venv" / "bin" / "python"
        command = [str(own) if own.exists() else sys.executable, "-c", WORKER]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=checkout, stdin=pipe, stdout=pipe, text=True)

    def turn(self, steps: int, counts: bool) -> list[str]:
        """Train for some steps. Return their losses."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("TURN "):
                _, wall, cpu, *losses = line.split()
                if counts:
                    self.turns.append((float(wall), float(cpu)))
                return losses
        raise SystemExit(f"process {self.process.pid} ended: see its message above")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compared(other: Path, turns: int) -> list[Result]:
    """Let this checkout and the other take `turns` turns each, after one that is not counted."""
    sides = [Side(HERE), Side(other)]
    try:
        for number in range(turns + 1):
            order = sides if number % 2 else sides[::-1]
            losses = {side: side.turn(STEPS, counts=number > 0) for side in order}
            if losses[sides[0]] != losses[sides[1]]:
                raise SystemExit(f"losses differ in turn {number}: {losses[sides[0]]} and {losses[sides[1]]}")
    finally:
        for side in sides:
            side.close()
    found = []
    for index, kind in enumerate(("wall", "CPU")):
        a, b = ([turn[index] / STEPS for turn in side.turns] for side in sides)
        ratio, name = median_ratio(a, b), f"training step on text vs the other checkout, {kind} time (s)"
        note = f"smoke model, 1 thread, losses equal, median of {turns} pairs of {STEPS} steps, spread {spread(a):.0%}"
        medians = (sorted(a)[len(a) // 2], sorted(b)[len(b) // 2])
        found.append(Result(name, *medians, ratio, f"<= {LIMIT}", ratio <= LIMIT, note))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.checkouts", description="Compare two checkouts.")
    parser.add_argument("directory", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=40)
    arguments = parser.parse_args()
    print(f"{machine()}\n\n{HEADER}", flush=True)
    results = compared(arguments.directory.resolve(), arguments.turns)
    print("\n".join(result.row for result in results))
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
