"""Activation checkpointing: a layer's backward computes again what was not kept (Chen et al. 2016)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.transformer import Transformer
from parallel.layout import Recompute

_KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
    }
)
"""Results that cost the most to make again: matrix products and attention."""


def apply(model: Transformer, mode: Recompute) -> None:
    """Wrap each layer's forward in place; names of modules and parameters stay as they are."""
    if mode is Recompute.none:
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode is Recompute.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, **options)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
