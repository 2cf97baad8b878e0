"""Sequences of 262,144 tokens on two ranks, from a file of text to a checkpoint."""

from __future__ import annotations

import json
import random
import time
from contextlib import closing
from pathlib import Path

import pytest

from launch.rank_pool import Pool
from parallel import cost
from parallel.layout import ContextMethod, ParallelConfig
from tests.support.tiny import config, trainer
from tests.support.traffic import step_traffic
from train.metrics import peak_memory_bytes

LONG = 1 << 18
SMALL = [
    "model.num_heads=1",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.attention_chunk_size=8192",
    "model.temperature_floor=8192",
    "model.router.top_k=1",
    f"training.seq_len={LONG}",
    "training.global_batch_size=1",
    "training.micro_batch_size=1",
    "training.steps=2",
    "evaluation.sequences=1",
    "data=files",
    "data.tokenizer.vocab_size=300",
    "parallel.cp=2",
]


def write_long_text(path: Path, seed: int) -> Path:
    """Write one document of more than `LONG` tokens. A byte-pair token has about two characters here."""
    chance, words = random.Random(seed), ["the", "model", "reads", "a", "line", "and", "writes", "another", "def"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(chance.choice(words) + str(chance.randrange(100)) for _ in range(160_000)))
    return path


def fitted(root: Path, overrides: list[str]) -> tuple[int, float, int]:
    """Train. Return the exit code, the seconds for steps and evaluation, and this rank's peak memory in bytes."""
    run, begin = trainer(root, "long", overrides), time.perf_counter()
    code = run.fit()
    return code, time.perf_counter() - begin, peak_memory_bytes(run.world.device)


@pytest.mark.slow
def test_a_run_over_a_quarter_of_a_million_tokens(tmp_path):
    """One document fills the sequence. A mask would take 64 GiB per layer; segmented attention needs linear memory."""
    text, held_out = (write_long_text(tmp_path / name / "text.txt", seed) for seed, name in enumerate(("text", "held")))
    sources = [f"data.sources.text.path={text}", f"+data.sources.text.held_out_path={held_out}"]
    overrides = [*SMALL, *sources, f"data.cache={tmp_path / 'cache'}", "parallel.cp_method=ring"]
    with closing(Pool()) as ranks:  # new processes: peak memory counts from the start of a process
        found = ranks(2, fitted, tmp_path, overrides, timeout_s=3600)
    print(f"{found[0][1]:.0f} s for two steps and an evaluation; peak memory {[peak >> 20 for *_, peak in found]} MiB")
    assert all(code == 0 and peak < 4 << 30 for code, _, peak in found)
    lines = [json.loads(line) for line in (tmp_path / "long" / "metrics.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if "loss" in line)
    assert second["tokens"] == 2 * LONG and second["loss"] < first["loss"] < 7
    run = config(tmp_path, "long", *overrides)
    layout = ParallelConfig(cp=2, cp_method=ContextMethod.ring).resolve(2)
    wanted = step_traffic(run.model, run.precision, layout, cost.BatchShape(1, 1, LONG, aligned=True))
    assert second["collective_bytes"] == {f"{axis}/{why}": size // 2 for (axis, why), size in wanted.items()}
