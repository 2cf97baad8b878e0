"""Build other MoE layers with our weights: transformers' Llama 4, Mixtral and Qwen3 blocks, and torchtitan's MoE.

A library is imported when its peer is made. Parameters share memory with ours if their layouts agree; otherwise they
are copies.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.config import RouterConfig
from model.moe import MixtureOfExperts


@dataclass(frozen=True)
class PeerBlock:
    """A function of x [1, T, D] and the parameters that get gradients from it."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]


@dataclass(frozen=True)
class Peer:
    """A layer to compare with, and how to install it."""

    make: Callable[[MixtureOfExperts, RouterConfig, bool], PeerBlock]
    """Takes our layer, the router's settings, and whether the peer computes the shared expert too (with our weights).
    If it does not, the block adds the output of our shared expert.
    """
    needs: tuple[str, ...]
    install: str
    casts: torch.dtype | None = None
    """Dtype of the experts' matmuls, if it is the same for every input dtype."""

    @property
    def missing(self) -> str | None:
        """A line that names the libraries that are not installed, or None."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed: {self.install}" if absent else None


def llama4(layer: MixtureOfExperts, router: RouterConfig, their_shared: bool) -> PeerBlock:
    """Build Llama 4's block. It runs every token through every expert, and always has a shared expert."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    assert their_shared
    experts, width, hidden = _sizes(layer)
    config: Any = Llama4TextConfig(
        hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=router.top_k,
        hidden_act="silu",
    )  # fmt: skip
    with torch.device("meta"):
        block: Any = Llama4TextMoe(config)
    block.router.weight = layer.router.weight
    block.experts.gate_up_proj = _parameter(layer.experts.gate_up.weight.flatten(1, 2).transpose(1, 2))
    block.experts.down_proj = _parameter(layer.experts.down.weight.transpose(1, 2))
    _give_shared(layer, block.shared_expert, TRANSFORMERS_MLP)
    return _together(block, None)


def mixtral(layer: MixtureOfExperts, router: RouterConfig, their_shared: bool) -> PeerBlock:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts, width, hidden = _sizes(layer)
    config: Any = MixtralConfig(
        hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=router.top_k
    )
    return _grouped(layer, MixtralSparseMoeBlock, config, their_shared)


def qwen3(layer: MixtureOfExperts, router: RouterConfig, their_shared: bool) -> PeerBlock:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    experts, width, hidden = _sizes(layer)
    config: Any = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=experts, num_experts_per_tok=router.top_k,
        norm_topk_prob=router.norm_topk_prob,
    )  # fmt: skip
    return _grouped(layer, Qwen3MoeSparseMoeBlock, config, their_shared)


def _grouped(layer: MixtureOfExperts, kind: Any, config: Any, their_shared: bool) -> PeerBlock:
    """Build a routed block of transformers that uses grouped matmuls."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    config._experts_implementation = "grouped_mm"
    shared: nn.Module | None = layer.shared
    with torch.device("meta"):
        block: Any = kind(config)
        if layer.shared is not None and their_shared:
            shared = Qwen3MoeMLP(config, layer.shared.gate.weight.shape[0])
            _give_shared(layer, shared, TRANSFORMERS_MLP)
    block.gate.weight = layer.router.weight
    block.experts.gate_up_proj = _parameter(layer.experts.gate_up.weight.flatten(1, 2))
    block.experts.down_proj = layer.experts.down.weight
    return _together(block, shared)


def torchtitan(layer: MixtureOfExperts, router: RouterConfig, their_shared: bool) -> PeerBlock:
    """Build torchtitan's MoE module, without torch.compile: router, local dispatcher and grouped experts."""
    from torchtitan.models.common.feed_forward import FeedForward
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    experts, width, hidden = _sizes(layer)

    def linear(from_width: int, to_width: int) -> Any:
        return Linear.Config(in_features=from_width, out_features=to_width, bias=False)

    mlp = None
    if layer.shared is not None and their_shared:
        inside = layer.shared.gate.weight.shape[0]
        mlp = FeedForward.Config(w1=linear(width, inside), w2=linear(inside, width), w3=linear(width, inside))
    config = MoE.Config(
        num_experts=experts,
        load_balance_coeff=None,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=width, hidden_dim=hidden, num_experts=experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=experts, top_k=router.top_k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=experts, gate=linear(width, experts), top_k=router.top_k,
            score_func=router.score.value, route_norm=router.norm_topk_prob,
        ),
        shared_experts=mlp,
    )  # fmt: skip
    with torch.device("meta"):
        block: Any = config.build()
    block.tokens_per_expert_E = torch.zeros(experts, device=layer.router.weight.device)
    block.router.gate.weight = layer.router.weight
    inner = block.routed_experts.inner_experts
    inner.w1_EFD, inner.w3_EFD = map(_parameter, layer.experts.gate_up.weight.unbind(1))
    inner.w2_EDF = layer.experts.down.weight
    warnings.filterwarnings("ignore", "In CPU autocast")  # its autocast to float32 changes nothing
    if mlp is None:
        return _together(block, layer.shared)
    _give_shared(layer, block.shared_experts, ("w1", "w3", "w2"))
    return _together(block, None)


def _sizes(layer: MixtureOfExperts) -> tuple[int, int, int]:
    """Return the number of experts, the hidden size and the expert hidden size."""
    experts, width, hidden = layer.experts.down.weight.shape
    return experts, width, hidden


def _parameter(weight: Tensor) -> nn.Parameter:
    """Return a weight of ours as a parameter: in the same memory if it is contiguous, else as a copy."""
    return nn.Parameter(weight.detach().contiguous())


TRANSFORMERS_MLP = ("gate_proj", "up_proj", "down_proj")


def _give_shared(layer: MixtureOfExperts, theirs: nn.Module, names: tuple[str, str, str]) -> None:
    """Give our gate, up and down weights to a peer's MLP, whose layers are called `names`."""
    ours = layer.shared
    assert ours is not None
    for name, linear in zip(names, (ours.gate, ours.up, ours.down), strict=True):
        getattr(theirs, name).weight = linear.weight


def _together(block: nn.Module, shared: nn.Module | None) -> PeerBlock:
    """Wrap a block that returns its output alone or first in a tuple. Adds the output of `shared`, if given."""

    def forward(x: Tensor) -> Tensor:
        y = block(x)
        y = (y[0] if isinstance(y, tuple) else y).view_as(x)
        return y if shared is None else y + shared(x)

    return PeerBlock(forward, [*block.parameters(), *(shared.parameters() if shared is not None else ())])


_TRANSFORMERS = (("transformers",), "pip install 'transformers>=5.20,<6'")
_TORCHTITAN = (  # only what its MoE imports: with all its dependencies, pip would replace other packages
    ("torchtitan", "spmd_types", "tyro", "typeguard", "docstring_parser", "triton"),
    "pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro typeguard docstring-parser triton",
)
LLAMA4 = Peer(llama4, *_TRANSFORMERS)
GROUPED = {
    "transformers Mixtral grouped": Peer(mixtral, *_TRANSFORMERS),
    "transformers Qwen3 grouped": Peer(qwen3, *_TRANSFORMERS),
    "torchtitan": Peer(torchtitan, *_TORCHTITAN, casts=torch.bfloat16),
}
