"""Other people's mixture layers with our weights: transformers' Llama 4, Mixtral and Qwen3 blocks, torchtitan's MoE.

Each is a module and a function of x [1, T, D]. A block without a shared expert gets transformers' dense MLP
added.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.moe import MixtureOfExperts


@dataclass(frozen=True)
class Block:
    module: nn.Module
    forward: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """Who is compared with us, and how to get it."""

    make: Callable[[MixtureOfExperts], Block]
    needs: tuple[str, ...]
    install: str
    casts: torch.dtype | None = None
    """In what its experts multiply, whatever the format of its input."""

    @property
    def missing(self) -> str | None:
        """One line if it cannot be had here."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not measured, no {' and no '.join(absent)} here: {self.install}" if absent else None


def _sizes(layer: MixtureOfExperts) -> tuple[int, int, int]:
    """Experts, width, expert width."""
    experts, width, hidden = layer.experts.down.weight.shape
    return experts, width, hidden


def llama4(layer: MixtureOfExperts) -> Block:
    """Every token runs through every expert."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    experts, width, hidden = _sizes(layer)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": hidden, "num_local_experts": experts}
    block = Llama4TextMoe(Llama4TextConfig(**sizes, num_experts_per_tok=1, hidden_act="silu"))
    block = block.to(layer.router.weight.dtype)
    with torch.no_grad():
        block.router.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.gate_up.weight.flatten(1, 2).transpose(1, 2))
        block.experts.down_proj.copy_(layer.experts.down.weight.transpose(1, 2))
    _copy_shared(layer, block.shared_expert, ("gate_proj", "up_proj", "down_proj"))
    return Block(block, lambda x: block(x)[0].view_as(x))


def mixtral(layer: MixtureOfExperts) -> Block:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts, width, hidden = _sizes(layer)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": hidden, "num_local_experts": experts}
    return _grouped(layer, MixtralSparseMoeBlock, MixtralConfig(**sizes, num_experts_per_tok=1))


def qwen3(layer: MixtureOfExperts) -> Block:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    experts, width, hidden = _sizes(layer)
    sizes: dict[str, Any] = {"hidden_size": width, "moe_intermediate_size": hidden, "num_experts": experts}
    return _grouped(layer, Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(**sizes, num_experts_per_tok=1, norm_topk_prob=True))


def _grouped(layer: MixtureOfExperts, kind: Any, config: Any) -> Block:
    """A routed block on transformers' grouped products."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    config._experts_implementation = "grouped_mm"
    block, shared = kind(config), Qwen3MoeMLP(config, _sizes(layer)[2])
    module = nn.ModuleList([block, shared]).to(layer.router.weight.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.gate_up.weight.flatten(1, 2))
        block.experts.down_proj.copy_(layer.experts.down.weight)
    _copy_shared(layer, shared, ("gate_proj", "up_proj", "down_proj"))

    def forward(x: Tensor) -> Tensor:
        y = block(x)
        return (y[0] if isinstance(y, tuple) else y) + shared(x)

    return Block(module, forward)


def torchtitan(layer: MixtureOfExperts) -> Block:
    """The whole of torchtitan's MoE module, with its router, local dispatcher, grouped and shared experts."""
    from torchtitan.models.common.feed_forward import FeedForward
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    experts, width, hidden = _sizes(layer)

    def linear(from_width: int, to_width: int) -> Any:
        return Linear.Config(in_features=from_width, out_features=to_width, bias=False)

    up, down = linear(width, hidden), linear(hidden, width)
    config = MoE.Config(
        num_experts=experts,
        load_balance_coeff=None,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=width, hidden_dim=hidden, num_experts=experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=experts, top_k=1),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=experts, gate=linear(width, experts), top_k=1, score_func="softmax", route_norm=True
        ),
        shared_experts=FeedForward.Config(w1=up, w2=down, w3=up),
    )
    block = MoE(config).to(layer.router.weight.dtype)
    inner = block.routed_experts.inner_experts
    with torch.no_grad():
        block.router.gate.weight.copy_(layer.router.weight)
        gate_EFD, up_EFD = layer.experts.gate_up.weight.unbind(1)
        inner.w1_EFD.copy_(gate_EFD)
        inner.w3_EFD.copy_(up_EFD)
        inner.w2_EDF.copy_(layer.experts.down.weight)
    _copy_shared(layer, block.shared_experts, ("w1", "w3", "w2"))
    warnings.filterwarnings("ignore", "In CPU autocast")  # it asks for float32 there, which changes nothing
    return Block(block, block)


def _copy_shared(layer: MixtureOfExperts, theirs: nn.Module, names: tuple[str, str, str]) -> None:
    """Our gate, up and down into theirs."""
    ours = layer.shared
    assert ours is not None
    with torch.no_grad():
        for name, linear in zip(names, (ours.gate, ours.up, ours.down), strict=True):
            getattr(theirs, name).weight.copy_(linear.weight)


_TRANSFORMERS = (("transformers",), "pip install 'transformers>=5.20,<6'")
_TORCHTITAN = (  # what its MoE imports; with all that it asks for, pip would replace other packages here
    ("torchtitan", "spmd_types", "tyro", "typeguard", "docstring_parser", "triton"),
    "pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro typeguard docstring-parser triton",
)
LLAMA4 = Peer(llama4, *_TRANSFORMERS)
GROUPED = {
    "transformers Mixtral grouped": Peer(mixtral, *_TRANSFORMERS),
    "transformers Qwen3 grouped": Peer(qwen3, *_TRANSFORMERS),
    "torchtitan": Peer(torchtitan, *_TORCHTITAN, casts=torch.bfloat16),
}
