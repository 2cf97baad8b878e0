"""Apply torch.compile to the dense half of each layer. Halves of the same kind are compiled once.

Routed experts stay eager: the number of tokens per expert depends on the data, and the grouped matmul cannot be traced
in float32 (torch 2.13: its shape function requires bfloat16). Of a layer with experts, attention with its norms is one
part, and each half of the shared expert another; a dense layer is one part. Shapes are static, but for the number of
documents.
Layers of the vision encoder are compiled for no tile, for one, and for any larger number.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from core.errors import ConfigError
from model.attention.layer import Attend, local_attention, varlen_attention
from model.moe import MixtureOfExperts
from model.transformer import Layer, Transformer
from parallel.layout import Layout
from precision.config import AttentionKind, PrecisionConfig

_MOST_VARIANTS = 64
"""Kinds of layers times shapes for which a function is compiled: those of training and evaluation in each phase."""


def traces_whole(layout: Layout, precision: PrecisionConfig, attention: AttentionKind) -> bool:
    """Return whether each part is one graph, so that a graph break is an error. Collectives of TP and CP, FP8 products
    and attention by segments break graphs, and only what is between them is compiled.
    """
    splits = layout.tp > 1 or layout.cp > 1
    return attention is AttentionKind.varlen and not splits and not precision.uses_float8


class GraphCompiler:
    """A compiler of torch.compile that counts its graphs."""

    def __init__(self, backend: str = "inductor") -> None:
        self.backend, self.graphs = backend, 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


def apply(model: Transformer, backend: str = "inductor", traces_whole: bool = False) -> GraphCompiler:
    """Compile the dense half of each layer in place. Names of modules and parameters do not change. Call
    `ForwardContext.prepare` before a forward pass. A pass with gradients in which nothing is compiled raises
    `ConfigError`.
    """
    compiler = GraphCompiler(backend)
    attends: dict[int, Attend] = {}  # layers share one object: several would cause recompilation

    def compiled(forward: Any, dynamic: bool = False) -> Any:
        whole = traces_whole and not dynamic
        known = signature(torch.compile).parameters  # 2.11 has no limit of a function's own
        limit: dict[str, Any] = {"recompile_limit": _MOST_VARIANTS} if "recompile_limit" in known else {}
        return _Checked(torch.compile(forward, backend=compiler, dynamic=dynamic, fullgraph=whole, **limit), compiler)

    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        attend = layer.attention.attend
        if attend not in (local_attention, varlen_attention):
            layer.attention.attend = attends.setdefault(id(attend), torch.compiler.disable(attend))
        if isinstance(layer.ffn, MixtureOfExperts):
            layer.attend = compiled(layer.attend)  # type: ignore[method-assign]
            if layer.ffn.shared is not None:
                shared: Any = layer.ffn.shared
                shared.first_half, shared.second_half = compiled(shared.first_half), compiled(shared.second_half)
        else:
            layer.forward = compiled(layer.forward)  # type: ignore[method-assign]
    if model.vision is not None:
        for encoder_layer in model.vision.layers.values():
            encoder_layer.forward = compiled(encoder_layer.forward, dynamic=True)
    return compiler


class _Checked:
    """Calls a compiled function, and raises `ConfigError` if nothing has been compiled by then."""

    def __init__(self, function: Any, compiler: GraphCompiler) -> None:
        self.function, self.compiler = function, compiler

    def __call__(self, *args: Any) -> Any:
        result = self.function(*args)
        if not self.compiler.graphs and torch.is_grad_enabled():
            breaks = torch._dynamo.utils.counters["graph_break"]
            why = next(iter(breaks), "torch traced no operation").split("\n")[0]
            raise ConfigError("parallel.compile", True, f"nothing could be compiled: {why}", [False])
        return result
