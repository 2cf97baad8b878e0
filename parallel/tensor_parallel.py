"""Tensor parallelism with sequence parallelism (Korthikanti et al. 2022, section 4.2).

Between the large matmuls every rank of the axis holds its part of the sequence. Before a column-parallel matmul the
sequence is gathered. After a row-parallel matmul the partial results are summed and scattered. Modules compute with
plain tensors of smaller shapes. Only their forward passes are wrapped here.

Shapes: B batch, T sequence, D hidden size, V vocabulary.
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
    """Wrap the forward passes of a model whose parameters have their local shapes already. The resulting logits are
    sharded along the vocabulary: see `parallel.vocab_parallel_loss`.
    """
    if axis.size == 1:
        return
    if model.embedding is not None:
        _wrap(model.embedding, partial(_embed, model.embedding, axis))
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        attention, feed_forward = layer.attention, layer.ffn
        _wrap(attention, partial(_gather_compute_scatter, attention.forward, axis, 1))
        if attention.layer.qk_norm is QKNorm.full:
            for norm in (attention.query_norm, attention.key_norm):
                _wrap(norm, partial(_normalise_heads, norm, axis))
        if not isinstance(feed_forward, MixtureOfExperts):
            _wrap(feed_forward, partial(_gather_compute_scatter, feed_forward.forward, axis, 1))
        elif feed_forward.shared is not None:
            _wrap(feed_forward.shared, partial(_gather_compute_scatter, feed_forward.shared.forward, axis, 0))
    if model.head is not None:
        _wrap(model.head, partial(_gather_compute, model.head.forward, axis))


def _wrap(module: Any, forward: Callable[..., Tensor]) -> None:
    module.forward = forward


def _gather_compute_scatter(forward: Callable[..., Tensor], axis: MeshAxis, dim: int, x: Tensor, *rest: Any) -> Tensor:
    """Gather `x` along `dim`, compute this rank's partial result, and reduce-scatter it along `dim`."""
    whole = collectives.all_gather(x, axis, dim, _ACTIVATIONS)
    return collectives.reduce_scatter(forward(whole, *rest), axis, dim, _ACTIVATIONS)


def _gather_compute(forward: Callable[[Tensor], Tensor], axis: MeshAxis, x_BTD: Tensor) -> Tensor:
    return forward(collectives.all_gather(x_BTD, axis, 1, _ACTIVATIONS))


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
