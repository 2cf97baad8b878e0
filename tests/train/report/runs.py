"""Make the files of a finished run, for tests of its report."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import yaml

from core.config import load, plain
from train.config import TrainConfig
from train.metap.hyperparameters import resolve


@cache
def composed(*overrides: str) -> TrainConfig:
    return resolve(load("train", TrainConfig, list(overrides)))


def make_run(directory: Path, *overrides: str, steps: int = 60, loss=lambda step: 7 - step / 20, **load_) -> Path:
    """Write the files of a finished run, with one evaluation in the middle and one at the end."""
    directory.mkdir(parents=True)
    config = composed(f"training.steps={steps}", "logging.every=2", *overrides)
    (directory / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    layers = sum(block.feed_forward.value == "moe" for block in config.model.blocks)
    expert = {"max_over_mean": 1.5, "entropy": 0.97, "dead": 0, **load_}
    with open(directory / "metrics.jsonl", "w") as file:
        for step in range(2, steps + 1, 2):
            line = {"step": step, "tokens": step * 2048, "loss": loss(step), "learning_rate": 1e-3}
            line |= {"gradient_norm": 0.5, "tokens_per_second": 7000.0, "mfu": None, "peak_memory_bytes": 700_000_000}
            if layers:
                line |= {"router_z": [0.5] * layers, "router_entropy": [0.9] * layers, "aux_loss": [0.0] * layers}
                line |= {"expert_load": [expert] * layers}
            file.write(json.dumps(line) + "\n")
            if step in (steps // 2, steps):
                held_out = {"code": {"loss": 4.25, "bits_per_byte": 2.0, "tokens": 10}}
                line = {"step": step, "tokens": step * 2048, "heldout_loss": 4.25, "heldout": held_out}
                file.write(json.dumps(line) + "\n")
    summary = {
        "steps": steps,
        "heldout_loss": 4.25,
        "bigram_loss": 4.5,
        "unigram_loss": 6.0,
        "total_parameters": 12345678,
    }
    summary |= {"heldout": {"bits_per_byte": 2.125, "sources": {"code": {"loss": 4.25}}}}
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "log.txt").write_text("2026-01-01 00:00:00 step 2/60\n")
    return directory
