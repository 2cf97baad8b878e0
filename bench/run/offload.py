"""Compare optimizer state on disk with optimizer state in memory: resident memory of the process, and step time.

Memory is measured in a separate process for each, after some steps and `malloc_trim`. With the state on disk it should
be lower by 12 bytes per parameter: fp32 weights and two moments. Times are interleaved in one process.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.measure import Result, interleaved, median_ratio
from bench.trainer_step import make_trainer
from train.trainer import Trainer

MODEL = [
    *("hparam=none", "model.hidden_size=512", "model.num_heads=8", "model.head_dim=64", "model.dense_hidden_size=2048"),
    *(
        "model.expert_hidden_size=1024",
        "training.seq_len=64",
        "training.global_batch_size=2",
        "training.micro_batch_size=2",
    ),
    *("logging.every=1000", "data.prefetch=0"),
]
STEPS = 4


def trainer(root: Path, disk: bool) -> Trainer:
    where = [f"parallel.zero.nvme={root / 'state'}", "parallel.zero.offload=nvme"] if disk else []
    return make_trainer(root, "disk" if disk else "memory", ["parallel.engine=deepspeed", *MODEL, *where])


def memory(root: str, where: str) -> None:
    """Print the resident bytes of this process after some steps, and the number of parameters."""
    made = trainer(Path(root), where == "disk")
    for step in range(STEPS):
        made.train_step(step)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    parameters = sum(parameter.numel() for parameter in made.engine.placed.model.parameters())
    print("MEMORY", int(fields["VmRSS"].split()[0]) * 1024, parameters)


def resident(root: str, where: str) -> tuple[int, int]:
    code = f"from bench.run.offload import memory; memory({root!r}, {where!r})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    words = next(line for line in said.splitlines() if line.startswith("MEMORY")).split()
    return int(words[1]), int(words[2])


def run() -> list[Result]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as root:
        (here, parameters), (there, _) = resident(root, "memory"), resident(root, "disk")
        fall, expected = here - there, 12 * parameters
        near = fall / expected
        found = [
            Result(
                "optimizer state on disk: memory saved (bytes) vs 12 per parameter",
                fall,
                expected,
                near,
                "0.9 to 1.1",
                0.9 <= near <= 1.1,
                f"{parameters / 1e6:.0f} million parameters, fp32, {here / 2**20:.0f} MiB before",
            )
        ]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as root:
        disk, plain = trainer(Path(root), True), trainer(Path(root), False)
        a, b = interleaved([lambda: disk.train_step(disk.step), lambda: plain.train_step(plain.step)], rounds=7)
    note = "128 tokens a step: the update is most of it; the disk's speed decides"
    name = "optimizer state on disk vs in memory (s a step)"
    return [*found, Result(name, statistics.median(a), statistics.median(b), median_ratio(a, b), "-", True, note)]
