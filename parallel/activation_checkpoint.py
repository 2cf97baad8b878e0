"""Activation checkpointing: a layer's backward computes again what was not kept (Chen et al. 2016)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.moe import MixtureOfExperts
from model.transformer import Layer, Transformer
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
"""Results that cost the most to make again: matrix products and attention."""


def apply(model: Transformer, mode: Recompute) -> None:
    """Wrap forwards in place; names of modules and parameters stay as they are.

    `full` repeats whole layers. `selective` repeats attention and feed-forward parts one by one, so that what lies
    between them is kept: the residual stream, and the rows that were sent to experts, whose journey is not repeated.
    (A part must hold no FSDP2 unit: torch 2.13 counts the operations of a region, and those of an inner unit's hooks
    differ between the forward and the repeated forward.)
    """
    if mode is Recompute.none:
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode is Recompute.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
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
