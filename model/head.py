"""Heads: logits, or the cross-entropy of labels without ever holding all logits.

Shapes: B batch, T tokens, D hidden size, V vocabulary (or this rank's part of it), W words of a block of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Embedding, Linear
from model.roles import Role
from precision.config import Products
from precision.gemm import GemmBackend, at_least_float32, widened
from precision.resolve import LayerGemms

IGNORED = -100
"""The label of a position without one."""
_BLOCK_BYTES = 128 << 20
"""Size of a block of logits in float32. Fewer logits are computed at once, and kept for the backward pass."""

_MULTIPLE = 64
"""The number of words of a block is a multiple of this, which matmuls prefer."""


class VocabShard(Protocol):
    """The part of the vocabulary that a rank has, from the word with the id `start`."""

    @property
    def start(self) -> int: ...

    def max(self, x: Tensor) -> None:
        """Take the maximum over the ranks that have the other parts, in place."""
        ...

    def sum(self, x: Tensor) -> None:
        """Sum over the ranks that have the other parts, in place."""
        ...


class _Head(nn.Module):
    """y = x W^T with W [V, D]."""

    gemm: GemmBackend
    shard: VocabShard | None = None
    """This rank's part of the vocabulary; None: all of it."""

    @property
    def table(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V], or with labels their cross-entropy [B, T] in nats, in at least float32: 0 where a
        label is `IGNORED`. All ranks of a `shard` get the same losses.
        """
        if labels_BT is None:
            return self.gemm.linear(x_BTD, self.table)
        x_TD, labels_T = x_BTD.flatten(0, 1), labels_BT.flatten()
        if x_TD.shape[0] * len(self.table) * 4 > _BLOCK_BYTES:
            losses_T: Tensor = _HeadLoss.apply(x_TD, self.table, labels_T, self.gemm, self.shard)
        else:
            losses_T = token_losses(self.gemm.linear(x_BTD, self.table).flatten(0, 1), labels_T, self.shard)
        # `_unsafe_view`, because FSDP2 warns about outputs that are views
        return torch.ops.aten._unsafe_view(losses_T, labels_BT.shape)


class Head(_Head, Linear):
    """A head with a weight of its own."""

    @property
    def table(self) -> Tensor:
        return self.weight


class TiedHead(_Head):
    """A head whose weight is the embedding's."""

    def __init__(self, embedding: Embedding, gemms: LayerGemms) -> None:
        super().__init__()
        self.gemm = gemms.of(Products.head, Role.head.value)
        self._embedding = (embedding,)  # in a tuple it does not become a submodule

    @property
    def table(self) -> Tensor:
        return self._embedding[0].weight


def token_losses(logits_TV: Tensor, labels_T: Tensor, shard: VocabShard | None = None) -> Tensor:
    """Return the cross-entropy of each label [T] in nats, in at least float32; 0 where it is `IGNORED`."""
    wide_TV = widened(logits_TV)
    if shard is None:
        return F.cross_entropy(wide_TV, labels_T, ignore_index=IGNORED, reduction="none")
    return _ShardedLoss.apply(wide_TV, labels_T, shard)


class _Sums(NamedTuple):
    """Sums over the words of a vocabulary, for each token: the largest logit, the sum of exp(logit - largest), and the
    logit of the label, 0 where another rank has it.
    """

    largest_T: Tensor
    exponentials_T: Tensor
    label_T: Tensor


def _sums(logits_TW: Tensor, labels_T: Tensor, first: int) -> _Sums:
    """Return the sums over a block of words that begins with id `first`. Overwrites the logits."""
    places_T1, here_T = _places(labels_T, first, logits_TW.shape[1])
    label_T = logits_TW.gather(1, places_T1)[:, 0] * here_T
    largest_T = logits_TW.amax(1)
    return _Sums(largest_T, logits_TW.sub_(largest_T[:, None]).exp_().sum(1), label_T)


def _places(labels_T: Tensor, first: int, words: int) -> tuple[Tensor, Tensor]:
    """Return the places of labels in a block [T, 1], clamped, and whether they are in it [T]."""
    places_T = labels_T - first
    return places_T.clamp(0, words - 1)[:, None], (places_T >= 0) & (places_T < words) & (labels_T >= 0)


def _log_sum_exp(sums: _Sums, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp and the label's logit over the whole vocabulary, [T] each."""
    if shard is None:
        return sums.largest_T + sums.exponentials_T.log(), sums.label_T
    largest_T = sums.largest_T.clone()
    shard.max(largest_T)
    both_2T = torch.stack([sums.exponentials_T * (sums.largest_T - largest_T).exp(), sums.label_T])
    shard.sum(both_2T)
    return largest_T + both_2T[0].log(), both_2T[1]


def _to_gradient(logits_TW: Tensor, lse_T: Tensor, grad_T: Tensor, labels_T: Tensor, first: int) -> Tensor:
    """Overwrite a block of logits with its gradient: grad * (softmax - 1 at the label)."""
    places_T1, here_T = _places(labels_T, first, logits_TW.shape[1])
    gradient_TW = logits_TW.sub_(lse_T[:, None]).exp_()
    gradient_TW.scatter_add_(1, places_T1, -here_T[:, None].to(gradient_TW.dtype))
    return gradient_TW.mul_(grad_T[:, None])


class _ShardedLoss(torch.autograd.Function):
    """The loss of logits that are sharded along the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, shard: VocabShard) -> Tensor:
        lse_T, label_T = _log_sum_exp(_sums(logits_TV.clone(), labels_T, shard.start), shard)
        ctx.save_for_backward(logits_TV, lse_T, labels_T)
        ctx.first = shard.start
        return (lse_T - label_T) * (labels_T >= 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, lse_T, labels_T = ctx.saved_tensors
        return _to_gradient(logits_TV.clone(), lse_T, grads[0] * (labels_T >= 0), labels_T, ctx.first), None, None


class _HeadLoss(torch.autograd.Function):
    """The loss of a head's input, by blocks of words. The backward pass computes the logits again, block by block: a
    third more work in the head, for memory that does not grow with the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, gemm: GemmBackend, shard: VocabShard | None
    ) -> Tensor:
        start, total = 0 if shard is None else shard.start, None
        for rows, w_WD in _blocks(gemm.narrowed(w_VD), len(x_TD)):
            logits_TW = _logits(gemm, x_TD, w_WD)
            found = _sums(logits_TW, labels_T, start + rows.start)
            total = found if total is None else _added(total, found)
        assert total is not None
        lse_T, label_T = _log_sum_exp(total, shard)
        ctx.save_for_backward(x_TD, w_VD, lse_T, labels_T)
        ctx.gemm, ctx.start = gemm, start
        return (lse_T - label_T) * (labels_T >= 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_TD, w_VD, lse_T, labels_T = ctx.saved_tensors
        gemm: GemmBackend = ctx.gemm
        grad_T, (needs_x, needs_w, *_) = grads[0] * (labels_T >= 0), ctx.needs_input_grad
        to_x = torch.zeros_like(x_TD, dtype=at_least_float32(x_TD.dtype)) if needs_x else None
        to_w = torch.empty_like(w_VD) if needs_w else None
        for rows, w_WD in _blocks(gemm.narrowed(w_VD), len(x_TD)):
            logits_TW = _logits(gemm, x_TD, w_WD)
            narrow_TW = _to_gradient(logits_TW, lse_T, grad_T, labels_T, ctx.start + rows.start).to(gemm.compute_dtype)
            del logits_TW
            if to_x is not None:
                to_x += gemm.input_gradient(narrow_TW, w_WD)
            if to_w is not None:
                to_w[rows].copy_(gemm.weight_gradient(narrow_TW, x_TD))
        return None if to_x is None else to_x.to(x_TD.dtype), to_w, None, None, None


def _blocks(w_VD: Tensor, tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of words, with their rows of the weight. Their logits fill `_BLOCK_BYTES`."""
    words = max(_BLOCK_BYTES // (4 * tokens) // _MULTIPLE * _MULTIPLE, _MULTIPLE)
    for begin in range(0, len(w_VD), words):
        rows = slice(begin, min(begin + words, len(w_VD)))
        yield rows, w_VD[rows]


def _logits(gemm: GemmBackend, x_TD: Tensor, w_WD: Tensor) -> Tensor:
    logits_TW = gemm.linear(x_TD, w_WD)
    return logits_TW.to(at_least_float32(logits_TW.dtype))


def _added(one: _Sums, other: _Sums) -> _Sums:
    largest_T = torch.maximum(one.largest_T, other.largest_T)
    scaled = [sums.exponentials_T * (sums.largest_T - largest_T).exp() for sums in (one, other)]
    return _Sums(largest_T, scaled[0] + scaled[1], one.label_T + other.label_T)
