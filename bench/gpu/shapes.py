"""Shapes of published models, and small shapes for a dry run.

Shapes: D hidden size, F expert hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import ModelConfig, RouterConfig, Score, WeightsOn

LLAMA4 = RouterConfig()
QWEN3 = RouterConfig(top_k=8, score=Score.softmax, norm_topk_prob=True, weights_on=WeightsOn.output)
DEEPSEEK = RouterConfig(top_k=8, norm_topk_prob=True, scale=2.5, weights_on=WeightsOn.output)

ROWS_MULTIPLE = 32
"""In grouped matmuls, each expert's number of tokens is a multiple of this, so that every recipe gets the same."""


@dataclass(frozen=True)
class MoEShape:
    """The MoE layer of a published model. `shared`: hidden size of its shared expert, 0 without one."""

    name: str
    width: int
    hidden: int
    experts: int
    router: RouterConfig
    shared: int = 0

    def config(self, **router: bool) -> ModelConfig:
        return ModelConfig(
            hidden_size=self.width,
            expert_hidden_size=self.hidden,
            shared_expert_hidden_size=self.shared,
            num_experts=self.experts,
            router=replace(self.router, **router),  # type: ignore[arg-type]
        )

    @property
    def active_width(self) -> int:
        """Hidden size of a dense layer with as many parameters as are active in the MoE layer."""
        return self.router.top_k * self.hidden + self.shared

    def flops(self, tokens: int) -> float:
        """Return the FLOPs of a forward and backward pass, counted as in `model.flops`."""
        return 6.0 * tokens * (3 * self.width * self.active_width + self.experts * self.width)

    @property
    def shape(self) -> dict[str, int | str]:
        return {"D": self.width, "F": self.hidden, "E": self.experts, "K": self.router.top_k, "shared": self.shared}


SCOUT = MoEShape("Llama 4 Scout", 5120, 8192, 16, LLAMA4, shared=8192)
MAVERICK = MoEShape("Llama 4 Maverick", 5120, 8192, 128, LLAMA4, shared=8192)
QWEN3_30B = MoEShape("Qwen3 30B", 2048, 768, 128, QWEN3)
DEEPSEEK_V3 = MoEShape("DeepSeek V3, a quarter of its experts", 7168, 2048, 64, DEEPSEEK, shared=2048)


def moe_shapes(dry: bool, memory_bytes: int) -> list[MoEShape]:
    """Return the layers that fit into memory with their gradients. Maverick keeps only as many experts as fit into a
    quarter of the memory.
    """
    if dry:
        return [
            MoEShape("tiny top-1", 64, 128, 4, LLAMA4, shared=128),
            MoEShape("tiny top-2", 64, 32, 8, replace(QWEN3, top_k=2)),
        ]
    experts = MAVERICK.experts
    while experts * 3 * MAVERICK.width * MAVERICK.hidden * 2 > memory_bytes / 4:
        experts //= 2
    some = replace(MAVERICK, experts=experts, name=f"{MAVERICK.name}, {experts} of {MAVERICK.experts} experts")
    return [SCOUT, QWEN3_30B, DEEPSEEK_V3, MAVERICK if experts == MAVERICK.experts else some]


def matrices(dry: bool) -> dict[str, tuple[int, int]]:
    """Return the output and input width of dense matmuls, by name."""
    if dry:
        return {"tiny": (96, 64)}
    return {
        "Llama 4 shared gate": (8192, 5120),
        "Llama 4 shared down": (5120, 8192),
        "Llama 4 query": (5120, 5120),
        "Llama 4 key": (1024, 5120),
        "Qwen3 30B query": (4096, 2048),
        "DeepSeek V3 shared gate": (2048, 7168),
        "head of 50,304 words": (50304, 2048),
    }


def counts(rows: int, experts: int, load: str) -> Tensor:
    """Return the number of tokens of each expert, int64 on the host, in multiples of ROWS_MULTIPLE: all about equal
    ("balanced"), or proportional to 1 / rank (Zipf) with random ranks.
    """
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(0))
    share = torch.ones(experts) if load == "balanced" else 1 / (order + 1.0)
    units = rows // ROWS_MULTIPLE
    found = (share / share.sum() * units).long()
    found[share.argsort(descending=True, stable=True)[: units - int(found.sum())]] += 1
    return found * ROWS_MULTIPLE
