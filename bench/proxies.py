"""The sweeps behind `configs/hparam/`: `python -m bench.proxies OUT [NAME ...]`, without names all of them.

Each is a small model of one kind (router, norms, head width, sparsity), trained over a grid of learning rates and
weight decays by the real commands; the best becomes `configs/hparam/NAME.yaml`. A rerun resumes a stopped sweep.
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
"""Heads as wide as the target's: normalised queries without a gain cannot take a factor on export."""
OPEN = [
    *LARGE,
    "model.nope_every=0",
    "model.attention_chunk_size=null",
    "model.moe_every=1",
    "model.shared_expert_hidden_size=0",
]
"""Softmax routers on outputs, every layer a mixture, whole rows of attention."""
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
    """What `metap fit` makes of the sweep of proxy `name`."""
    for action in (["sweep", *RUN, *PROXIES[name]], ["fit"]):
        subprocess.run([sys.executable, "-m", "launch.cli", "metap", action[0], f"out={out}", *action[1:]], check=True)
    return yaml.safe_load((out / "base.yaml").read_text())


def preset(found: dict[str, Any], name: str) -> str:
    """The part of a fitted base that says what was found, and leaves open what a run may choose (its optimizer)."""
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
