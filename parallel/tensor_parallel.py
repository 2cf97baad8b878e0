"""Tensor parallelism with sequence parallelism (Korthikanti et al. 2022, section 4.2).

Between the large matmuls every rank of the axis holds its part of the sequence. Before a column-parallel matmul the
sequence is gathered. After a row-parallel matmul the partial results are summed and scattered. Modules compute with
plain tensors of smaller shapes. Only their forward passes are wrapped here.

Shapes: B batch, T sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.attention.layer import Attention
from model.config import QKNorm
from model.layers import Embedding, RMSNorm
from model.moe import MixtureOfExperts
from model.transformer import Layer, Transformer
from parallel.comm import collectives
from parallel.mesh import MeshAxis
from precision.gemm import widened

_ACTIVATIONS = "activations"


def apply(model: Transformer, axis: MeshAxis) -> None:
    """Wrap the forward passes of a model whose parameters have their local shapes already. The resulting logits are
    sharded along the vocabulary: `VocabAxis` computes their loss.
    """
    if axis.size == 1:
        return
    if model.embedding is not None:
        _wrap(model.embedding, partial(_embed, model.embedding, axis))
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        attention, feed_forward = layer.attention, layer.ffn
        _wrap(attention, GatherScatter(attention.forward, axis, 1))
        if isinstance(attention, Attention) and attention.layer.qk_norm is QKNorm.full:
            for norm in (attention.query_norm, attention.key_norm):
                _wrap(norm, partial(_normalise_heads, norm, axis))
        if not isinstance(feed_forward, MixtureOfExperts):
            _wrap(feed_forward, GatherScatter(feed_forward.forward, axis, 1))
        elif feed_forward.shared is not None:
            shared: Any = feed_forward.shared
            shared.first_half = Gathered(shared.first_half, axis, 0)
            shared.second_half = partial(_compute_scatter, shared.second_half, axis)
    if model.head is not None:
        _wrap(model.head, partial(_gather_compute, model.head.forward, axis))
        model.head.shard = VocabAxis(axis, axis.rank * len(model.head.table))


def _wrap(module: Any, forward: Callable[..., Tensor]) -> None:
    module.forward = forward


class Gathered:
    """Gathers `x` along `dim` and computes this rank's part."""

    def __init__(self, forward: Callable[..., Tensor], axis: MeshAxis, dim: int) -> None:
        self.forward, self.axis, self.dim = forward, axis, dim

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        return self.forward(self.gather(x), *rest)

    def gather(self, x: Tensor) -> Tensor:
        return collectives.all_gather(x, self.axis, self.dim, _ACTIVATIONS)


class GatherScatter(Gathered):
    """Gathers `x` along `dim`, computes this rank's partial result, and reduce-scatters it along `dim`."""

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        return collectives.reduce_scatter(super().__call__(x, *rest), self.axis, self.dim, _ACTIVATIONS)


def _compute_scatter(forward: Callable[..., Tensor], axis: MeshAxis, x_TF: Tensor) -> Tensor:
    return collectives.reduce_scatter(forward(x_TF), axis, 0, _ACTIVATIONS)


def _gather_compute(forward: Callable[..., Tensor], axis: MeshAxis, x_BTD: Tensor, *rest: Any) -> Tensor:
    return forward(collectives.all_gather(x_BTD, axis, 1, _ACTIVATIONS), *rest)


@dataclass(frozen=True)
class VocabAxis:
    """The vocabulary, sharded over the ranks of an axis. `start`: the id of this rank's first word."""

    axis: MeshAxis
    start: int

    def max(self, x: Tensor) -> None:
        self.axis.reduce(x, "loss", dist.ReduceOp.MAX)

    def sum(self, x: Tensor) -> None:
        self.axis.sum(x, "loss")


def _embed(embedding: Embedding, axis: MeshAxis, tokens_BT: Tensor) -> Tensor:
    """Return the embeddings of this rank's part of the sequence. The rows of the table are sharded over the axis."""
    size = embedding.weight.shape[0]
    local_BT = tokens_BT - axis.rank * size
    here_BT = (local_BT >= 0) & (local_BT < size)
    rows_BTD = F.embedding(local_BT.clamp(0, size - 1), embedding.weight) * here_BT[..., None]
    return collectives.reduce_scatter(rows_BTD.to(embedding.dtype), axis, 1, _ACTIVATIONS)


def _normalise_heads(norm: RMSNorm, axis: MeshAxis, x: Tensor) -> Tensor:
    """Normalise by the RMS over all heads, of which this rank has some."""
    wide = widened(x)
    squares = collectives.all_reduce(wide.square().sum(-1, keepdim=True), axis, _ACTIVATIONS)
    mean = squares / (x.shape[-1] * axis.size)
    return (wide * torch.rsqrt(mean + norm.eps)).to(x.dtype) * norm.weight.to(x.dtype)
