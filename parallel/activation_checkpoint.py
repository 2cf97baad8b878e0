"""Activation checkpointing: the backward pass recomputes activations that were not kept (Chen et al. 2016)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.moe import MixtureOfExperts
from model.transformer import Layer
from model.vision.towers import Network
from parallel.layout import Recompute
from precision import cpu_gemm

_KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.aten._scaled_mm_v2.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        *cpu_gemm.PRODUCTS,
    }
)
"""Operations whose results `selective` keeps, as the costliest to recompute: matmuls and attention."""


def apply(model: Network, mode: Recompute, gathers: bool = False) -> None:
    """Checkpoint the layers of a model in place. Names of modules and parameters do not change.

    `full` recomputes whole layers. `selective` recomputes attention, experts and dense feed-forward parts separately,
    except the operations in `_KEPT`. It keeps the inputs of these parts, so no token is sent to its experts again. (No
    part may contain an FSDP2 unit: torch 2.13 finds a kept result by the number of preceding calls of its operation,
    and the hooks of an inner unit issue other operations in the recomputation.)

    Layers of the vision encoder are recomputed whole in both modes. Keeping their matmuls and attention would keep most
    of their activations. `gathers`: hooks of modules inside these parts gather parameters, as in DeepSpeed's stage 3.
    """
    if mode is Recompute.none:
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if model.vision is not None:
        for layer in model.vision.layers.values():
            layer.forward = partial(checkpoint, layer.forward, **options)
    if mode is Recompute.selective:
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        options["context_fn"] = partial(_without_hooks, contexts) if gathers else contexts
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        modules: list[Any] = [layer] if mode is Recompute.full else _parts(layer)
        for module in modules:
            module.forward = partial(checkpoint, module.forward, **options)


def _parts(layer: Layer) -> list[nn.Module]:
    if not isinstance(layer.ffn, MixtureOfExperts):
        return [layer.attention, layer.ffn]
    shared = [] if layer.ffn.shared is None else [layer.ffn.shared]
    return [layer.attention, layer.ffn.experts, *shared]


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _without_hooks(contexts: Any) -> tuple[Any, Any]:
    """Return the contexts of a forward pass and its recomputation, whose hooks may issue other operations."""
    keeping, reusing = contexts()
    return keeping, _ReuseKept(reusing)


class _ReuseKept(TorchDispatchMode):
    """Pass to torch's mode the operations in `_KEPT` alone. It refuses others that the forward pass did not issue, such
    as gathering parameters that were prefetched there. With torch.compile it would need rules of its own.
    """

    def __init__(self, reusing: Any) -> None:
        super().__init__()
        self.reusing = reusing

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in _KEPT:
            return self.reusing.__torch_dispatch__(operation, types, args, kwargs or {})
        return operation(*args, **(kwargs or {}))
