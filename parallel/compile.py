"""torch.compile of each layer by itself, an option: repeated blocks are compiled once per kind.

Mixtures stay eager: how many rows each expert gets is data, and the grouped product cannot be traced in float32
(torch 2.13: its shape function wants bfloat16). So does attention over rows that several ranks have.
"""

from __future__ import annotations

from typing import Any

import torch

from model.attention.layer import Attend, local_attention
from model.moe import MixtureOfExperts
from model.transformer import Layer, Transformer


def apply(model: Transformer) -> None:
    """Compile in place; names of modules and parameters stay as they are. Contexts must be prepared before they are
    used: see `ForwardContext.prepare`.
    """
    attends: dict[int, Attend] = {}  # one object for all layers, or each would be a reason to compile again
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        if isinstance(layer.ffn, MixtureOfExperts):
            mixture: Any = layer.ffn
            mixture.forward = torch.compiler.disable(mixture.forward)
        attend = layer.attention.attend
        if attend is not local_attention:
            layer.attention.attend = attends.setdefault(id(attend), torch.compiler.disable(attend))
        layer.compile()
