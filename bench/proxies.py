"""The sweep that chose the smoke run's vocabulary and learning rate: `python -m bench.sweep_smoke [KEY=VALUE ...]`.

One run after the other through the real command, each for the same number of tokens. What counts is the margin below
the bigram model of the tokens consumed, and bits per byte, which compares vocabularies.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS = 614_400
GRID = {
    "data.tokenizer.vocab_size": ["512", "1024", "2048"],
    "optimizer.lr": ["2e-3", "4e-3", "8e-3"],
    "training.global_batch": ["8"],
}


def run(root: Path, name: str, choice: dict[str, str], extra: list[str]) -> dict[str, float]:
    rows = int(choice["training.global_batch"])
    overrides = [f"{key}={value}" for key, value in choice.items()]
    overrides += [f"model.vocab_size={choice['data.tokenizer.vocab_size']}", f"training.steps={TOKENS // (256 * rows)}"]
    overrides += ["evaluation.every=0", "checkpoint.every=0", f"run.root={root}", f"run.name={name}", *extra]
    subprocess.run([sys.executable, "-m", "launch.cli", "train", *overrides], check=True, stdout=subprocess.DEVNULL)
    return json.loads((root / name / "summary.json").read_text())


def main(extra: list[str]) -> None:
    print("| " + " | ".join(GRID) + " | held-out | bits/byte | bigram | margin | tok/s |", flush=True)
    print("|---" * (len(GRID) + 5) + "|")
    with tempfile.TemporaryDirectory() as root:
        for number, values in enumerate(itertools.product(*GRID.values())):
            found = run(Path(root), f"run{number}", dict(zip(GRID, values, strict=True)), extra)
            margin = found["bigram_loss"] - found["heldout_loss"]
            bits = found["heldout"]["bits_per_byte"]  # type: ignore[index]
            figures = f"{found['heldout_loss']:.3f} | {bits:.3f} | {found['bigram_loss']:.3f} | {margin:+.3f}"
            print(f"| {' | '.join(values)} | {figures} | {found['tokens_per_second']:,.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
