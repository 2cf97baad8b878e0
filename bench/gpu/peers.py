"""Other people's mixtures with our weights. They take part where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.config import RouterConfig
from model.moe import MixtureOfExperts

Made = tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]


@dataclass(frozen=True)
class Peer:
    """`make(layer, router)`: a forward over [1, T, D] with the layer's parameters, and those that get gradients."""

    module: str
    install: str
    make: Callable[[MixtureOfExperts, RouterConfig], Made]

    def missing(self) -> str | None:
        return None if importlib.util.find_spec(self.module) else self.install


def mixtral(layer: MixtureOfExperts, router: RouterConfig) -> Made:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts, width, hidden = _sizes(layer)
    config: Any = MixtralConfig(
        hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=router.top_k
    )
    return _grouped(MixtralSparseMoeBlock, config, layer)


def qwen3(layer: MixtureOfExperts, router: RouterConfig) -> Made:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    experts, width, hidden = _sizes(layer)
    config: Any = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=experts, num_experts_per_tok=router.top_k,
        norm_topk_prob=router.renormalise,
    )  # fmt: skip
    return _grouped(Qwen3MoeSparseMoeBlock, config, layer)


def _sizes(layer: MixtureOfExperts) -> tuple[int, int, int]:
    experts, width, hidden = layer.experts.down.weight.shape
    return experts, width, hidden


def _grouped(block_class: Any, config: Any, layer: MixtureOfExperts) -> Made:
    """A routed block of transformers on its grouped products; our shared expert is added, if there is one."""
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = block_class(config)
    block.gate.weight = layer.router.weight
    block.experts.gate_up_proj = nn.Parameter(layer.experts.gate_up.weight.detach().flatten(1, 2))
    block.experts.down_proj = layer.experts.down.weight
    shared = layer.shared

    def forward(x: Tensor) -> Tensor:
        y = block(x)
        y = y[0] if isinstance(y, tuple) else y
        return y if shared is None else y + shared(x)

    return forward, [*block.parameters(), *(shared.parameters() if shared is not None else ())]


_TRANSFORMERS = "pip install 'transformers>=5.20,<6'"
PEERS = {
    "transformers Mixtral, grouped": Peer("transformers", _TRANSFORMERS, mixtral),
    "transformers Qwen3, grouped": Peer("transformers", _TRANSFORMERS, qwen3),
}
