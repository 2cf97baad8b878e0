"""Apply torch.compile to each layer separately. Layers of the same kind are compiled once.

MoE layers stay eager: the number of tokens per expert depends on the data, and the grouped matmul cannot be traced in
float32 (torch 2.13: its shape function requires bfloat16). Attention over context-parallel sequences stays eager too.
Layers of the vision encoder are compiled three times: for no tile, for one, and for any larger number.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from model.attention.layer import Attend, local_attention
from model.moe import MixtureOfExperts
from model.transformer import Layer, Transformer


def apply(model: Transformer) -> None:
    """Compile each layer in place. Names of modules and parameters do not change. Call `ForwardContext.prepare` before
    a forward pass.
    """
    attends: dict[int, Attend] = {}  # layers share one object: several would cause recompilation
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        if isinstance(layer.ffn, MixtureOfExperts):
            moe: Any = layer.ffn
            moe.forward = torch.compiler.disable(moe.forward)
        attend = layer.attention.attend
        if attend is not local_attention:
            layer.attention.attend = attends.setdefault(id(attend), torch.compiler.disable(attend))
        layer.compile()
    if model.vision is not None:
        for encoder_layer in model.vision.layers.values():
            encoder_layer.forward = _compiled(encoder_layer.forward)


def _compiled(forward: Any) -> Any:
    """Compile a forward pass for any number of tiles. If it is checkpointed, compile what the checkpoint calls: torch
    2.13 leaves a module eager whose forward pass is a checkpoint.
    """
    if isinstance(forward, partial):
        return partial(forward.func, _compiled(forward.args[0]), **forward.keywords)
    return torch.compile(forward, dynamic=True)
