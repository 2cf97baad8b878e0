"""torch.compile of each layer by itself, an option: repeated blocks are compiled once per kind.

Mixtures stay eager: how many rows each expert gets is data, and the grouped product cannot be traced in float32
(torch 2.13: its shape function wants bfloat16).
"""

from __future__ import annotations

from typing import Any

import torch

from model.moe import MixtureOfExperts
from model.transformer import Layer, Transformer


def apply(model: Transformer) -> None:
    """Compile in place; names of modules and parameters stay as they are."""
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if isinstance(layer.ffn, MixtureOfExperts):
            mixture: Any = layer.ffn
            mixture.forward = torch.compiler.disable(mixture.forward)
        layer.compile()
    model.register_forward_pre_hook(_prepare)


def _prepare(model: Any, arguments: tuple[Any, ...]) -> None:
    if len(arguments) > 1 and arguments[1] is not None:
        arguments[1].prepare(model.config, model.embedding.dtype)
