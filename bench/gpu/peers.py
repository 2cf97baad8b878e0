"""Other people's mixtures with our weights, our shared expert added to each. They take part if they are installed."""

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
    """A routed block of transformers on its grouped products."""
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = block_class(config)
    block.gate.weight = layer.router.weight
    block.experts.gate_up_proj = nn.Parameter(layer.experts.gate_up.weight.detach().flatten(1, 2))
    block.experts.down_proj = layer.experts.down.weight
    return _with_shared(block, layer)


def torchtitan(layer: MixtureOfExperts, router: RouterConfig) -> Made:
    """torchtitan 0.3's mixture, without torch.compile."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    experts, width, hidden = _sizes(layer)
    routed = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=width, hidden_dim=hidden, num_experts=experts),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=experts, top_k=router.top_k),
    )
    scores = TokenChoiceTopKRouter.Config(
        num_experts=experts, gate=Linear.Config(in_features=width, out_features=experts), top_k=router.top_k,
        score_func=router.score.value, route_norm=router.renormalise,
    )  # fmt: skip
    config = MoE.Config(num_experts=experts, routed_experts=routed, router=scores, load_balance_coeff=None)
    with torch.device("meta"):
        block: Any = config.build()
    block.tokens_per_expert_E = torch.zeros(experts, device=layer.router.weight.device)
    block.router.gate.weight = layer.router.weight
    inner = block.routed_experts.inner_experts
    gate, up = layer.experts.gate_up.weight.detach().unbind(1)
    inner.w1_EFD, inner.w3_EFD = nn.Parameter(gate.contiguous()), nn.Parameter(up.contiguous())
    inner.w2_EDF = layer.experts.down.weight
    return _with_shared(block, layer)


def _with_shared(block: Any, layer: MixtureOfExperts) -> Made:
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
    "torchtitan": Peer("torchtitan", "pip install torchtitan==0.3.0", torchtitan),
}
