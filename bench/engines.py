"""Try which features each engine supports: `python -m bench.engines` writes the table into docs/engines.md.

A cell is "yes" if a configuration with the overrides of its row and column passes every check that is made before the
model is built.
"""

from __future__ import annotations

from pathlib import Path

from core.config import load
from core.errors import ConfigError
from core.files import write_text
from parallel.pipeline.stages import PipelineSchedule
from train.config import TrainConfig, check

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
BEGIN, END = "<!-- made by python -m bench.engines -->\n", "<!-- end -->\n"
RANKS = 4
BATCH = ["training.global_batch_size=32", "training.micro_batch_size=1"]
ENGINES = {
    "fsdp2": [],
    **{f"ZeRO-{stage}": ["parallel.engine=deepspeed", f"parallel.zero.stage={stage}"] for stage in (1, 2, 3)},
}
DENSE = ["model.moe_every=0"]
FEATURES = {
    "dense models": DENSE,
    "MoE models": ["parallel.ep=2"],
    "tp": [*DENSE, "parallel.tp=2"],
    "cp": [*DENSE, "parallel.cp=2"],
    "dp_replicate": [*DENSE, "parallel.dp_replicate=2"],
    **{
        f"pp, {schedule.value}": [*DENSE, "parallel.pp=2", f"parallel.schedule={schedule.name}"]
        for schedule in PipelineSchedule
    },
    "precision=fp32": [*DENSE, "precision=fp32"],
    "precision=bf16": [*DENSE, "precision=bf16"],
    "precision=fp64": [*DENSE, "precision=fp64"],
    "precision=fp8": [*DENSE, "precision=fp8", "precision.backend=emulated"],
    "precision.param_dtype=bfloat16": [*DENSE, "precision=bf16", "precision.param_dtype=bfloat16"],
    "AdamW": [*DENSE, "optimizer=adamw"],
    "AdamW, moments in bf16": [*DENSE, "optimizer.moments=bfloat16"],
    "Muon": [*DENSE, "optimizer=muon"],
    "MetaP": [*DENSE, "hparam=smoke", "hparam.kind={}"],
    "recompute": [*DENSE, "parallel.recompute=full"],
    "compile": [*DENSE, "parallel.compile=true"],
    "sums over ranks in bf16": [*DENSE, "parallel.reduce_dtype=bfloat16"],
    "optimizer state on the host": [*DENSE, "parallel.zero.offload=cpu"],
    "optimizer state on disk": [*DENSE, "parallel.zero.offload=nvme", "parallel.zero.nvme=/tmp"],
    "parameters on the host": [*DENSE, "parallel.zero.offload_parameters=cpu"],
}


def supported(overrides: list[str]) -> bool:
    try:
        check(load("train", TrainConfig, ["hparam=none", *BATCH, *overrides]), RANKS)
    except ConfigError:
        return False
    return True


def table() -> str:
    lines = [f"| | {' | '.join(ENGINES)} |", "|---" * (len(ENGINES) + 1) + "|"]
    for feature, wanted in FEATURES.items():
        cells = ["yes" if supported([*how, *wanted]) else "-" for how in ENGINES.values()]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    write_text(PAGE, before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
