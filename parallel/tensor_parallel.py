"""Tensor parallelism with sequence parallelism (Korthikanti et al. 2022, section 4.2).

Between the large products every rank of the axis has its part of the sequence; before a product cut by columns the
sequence is gathered, after one cut by rows the partial results are summed and scattered. Modules compute with plain
tensors of smaller shapes and do not know; what is wrapped here is their forward.

Shapes: B batch, T sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import QKNorm
from model.layers import Embedding, RMSNorm
from model.moe import MixtureOfExperts
from model.transformer import Layer, Transformer
from parallel.comm import collectives
from parallel.mesh import MeshAxis
from precision.gemm import widened

_ACTIVATIONS = "activations"


def apply(model: Transformer, axis: MeshAxis) -> None:
    """Wrap the forwards of a model whose parameters have their local shapes already. The logits come out cut along
    the vocabulary: see `parallel.vocab_parallel_loss`.
    """
    if axis.size == 1:
        return
    if model.embedding is not None:
        _wrap(model.embedding, partial(_embed, model.embedding, axis))
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        attention, feed_forward = layer.attention, layer.ffn
        _wrap(attention, partial(_between, attention.forward, axis, 1))
        if attention.layer.qk_norm is QKNorm.full:
            for norm in (attention.query_norm, attention.key_norm):
                _wrap(norm, partial(_normalise_heads, norm, axis))
        if not isinstance(feed_forward, MixtureOfExperts):
            _wrap(feed_forward, partial(_between, feed_forward.forward, axis, 1))
            continue
        if feed_forward.shared is not None:
            _wrap(feed_forward.shared, partial(_between, feed_forward.shared.forward, axis, 0))
    if model.head is not None:
        _wrap(model.head, partial(_gathered, model.head.forward, axis))


def _wrap(module: Any, forward: Callable[..., Tensor]) -> None:
    module.forward = forward


def _between(forward: Callable[..., Tensor], axis: MeshAxis, dim: int, x: Tensor, *rest: Any) -> Tensor:
    """The whole of `dim` goes in, a partial sum comes out; this rank's part of both is what the caller sees."""
    whole = collectives.all_gather(x, axis, dim, _ACTIVATIONS)
    return collectives.reduce_scatter(forward(whole, *rest), axis, dim, _ACTIVATIONS)


def _gathered(forward: Callable[[Tensor], Tensor], axis: MeshAxis, x_BTD: Tensor) -> Tensor:
    return forward(collectives.all_gather(x_BTD, axis, 1, _ACTIVATIONS))


def _embed(embedding: Embedding, axis: MeshAxis, tokens_BT: Tensor) -> Tensor:
    """This rank's part of the sequence, out of rows of the table that lie on all ranks."""
    size = embedding.weight.shape[0]
    own_BT = tokens_BT - axis.rank * size
    here_BT = (own_BT >= 0) & (own_BT < size)
    rows_BTD = F.embedding(own_BT.clamp(0, size - 1), embedding.weight) * here_BT[..., None]
    return collectives.reduce_scatter(rows_BTD.to(embedding.dtype), axis, 1, _ACTIVATIONS)


def _normalise_heads(norm: RMSNorm, axis: MeshAxis, x: Tensor) -> Tensor:
    """RMS over the heads of all ranks, of which this one has some."""
    wide = widened(x)
    squares = collectives.all_reduce(wide.square().sum(-1, keepdim=True), axis, _ACTIVATIONS)
    mean = squares / (x.shape[-1] * axis.size)
    return (wide * torch.rsqrt(mean + norm.eps)).to(x.dtype) * norm.weight.to(x.dtype)
