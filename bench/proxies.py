"""Run all or the named sweeps behind `configs/hparam/`: `python -m bench.proxies OUT [NAME ...]`.

Each sweep trains a small model of one kind (router, norms, head dim and sparsity) over a grid of learning rates and
weight decays, with `metap sweep` and `metap fit`. The best run becomes `configs/hparam/NAME.yaml`. A rerun resumes a
stopped sweep.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from core.files import write_text

CONFIGS = Path(__file__).parent.parent / "configs" / "hparam"
RUN = [
    "hparam=none",
    "training.seq_len=256",
    "training.global_batch_size=8",
    "training.micro_batch_size=8",
    "evaluation.every=0",
    "evaluation.baselines=false",
    "checkpoint.every=0",
    "logging.every=50",
    "data.filter=null",
    "sweep.low=-9",
    "sweep.high=-4",
    "sweep.seeds=2",
    "sweep.processes=2",
]
SMALL = [
    *(
        "model.hidden_size=64",
        "model.num_layers=4",
        "model.num_heads=2",
        "model.num_kv_heads=1",
        "model.dense_hidden_size=256",
    ),
    *("model.expert_hidden_size=128", "training.steps=50", "schedule.warmup_steps=5"),
    *("sweep.axis=tokens", "sweep.factors=[1,2,4]"),
]
LARGE = [
    *("model.hidden_size=128", "model.num_layers=4", "model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=128"),
    *("model.dense_hidden_size=512", "training.steps=60", "schedule.warmup_steps=6", "optimizer.weight_decay=0.1,4"),
    "sweep.low=-10",
]
"""The head dim is the target's: if it differed, an export would have to scale queries by a factor, and queries that
are normalised without a gain cannot absorb one.
"""
OPEN = [
    *LARGE,
    "model.nope_every=0",
    "model.attention_chunk_size=null",
    "model.moe_every=1",
    "model.shared_expert_hidden_size=0",
]
"""Models in which every layer uses RoPE, attends to whole sequences, and has experts but no shared expert."""
SOFTMAX = ["model.router.score=softmax", "model.router.weights_on=output"]
PROXIES = {
    "smoke": SMALL,
    "llama4": [*LARGE, "model.moe_every=1", "model.num_experts=16"],
    "llama4_maverick": [*LARGE, "model.moe_every=2", "model.num_experts=128", "model.qk_norm=none"],
    "mixtral": [
        *(*OPEN, *SOFTMAX, "model.router.norm_topk_prob=true", "model.router.top_k=2", "model.qk_norm=none"),
        "model.expert_hidden_size=448",
    ],
    "olmoe": [
        *OPEN,
        *SOFTMAX,
        "model.router.top_k=8",
        "model.num_experts=64",
        "model.expert_hidden_size=64",
        "model.qk_norm=full",
    ],
    "qwen3": [
        *(*OPEN, *SOFTMAX, "model.router.norm_topk_prob=true", "model.router.top_k=8", "model.qk_norm=per_head"),
        *("model.num_experts=128", "model.expert_hidden_size=48"),
    ],
}


def fitted(out: Path, name: str) -> dict[str, Any]:
    """Run the sweep of the proxy `name`. Return the base that `metap fit` makes of it."""
    for action in (["sweep", *RUN, *PROXIES[name]], ["fit"]):
        subprocess.run([sys.executable, "-m", "launch.cli", "metap", action[0], f"out={out}", *action[1:]], check=True)
    return yaml.safe_load((out / "base.yaml").read_text())


def preset(found: dict[str, Any], name: str) -> str:
    """Return the YAML of what the sweep found. It leaves open what a run may choose, such as its optimizer."""
    optimizer, hparam = found["optimizer"], found["hparam"]
    kept = {key: hparam[key] for key in ("base", "kind", "tokens_exponent")}
    provenance = {key: value for key, value in hparam["provenance"].items() if key != "sweep"}
    content = {
        "optimizer": {key: optimizer[key] for key in ("lr", "weight_decay")},
        "hparam": {**kept, "provenance": {"command": f"python -m bench.proxies OUT {name}", **provenance}},
        "model": {"init": found["model"]["init"]},
    }
    head = "# @package _global_\n# Optimum of a sweep of a small model of this kind, by `python -m bench.proxies`.\n"
    return head + yaml.safe_dump(content, sort_keys=False)


def main(out: str, *names: str) -> None:
    for name in names or PROXIES:
        write_text(CONFIGS / f"{name}.yaml", preset(fitted(Path(out) / name, name), name))
        print(f"proxies: {CONFIGS / name}.yaml", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
