"""Heads: logits, or the cross-entropy of labels without ever holding all logits.

Shapes: B batch, T tokens, D hidden size, V vocabulary (or this rank's part of it), W words of a block of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import LossKernels, loss_kernels_for
from model.kernels.loss import LossSums
from model.layers import Embedding, Linear
from model.roles import Role
from precision.config import Products
from precision.gemm import GemmBackend, at_least_float32, widened
from precision.resolve import LayerGemms

IGNORED = -100
"""The label of a position without one."""
_BLOCK_BYTES = 128 << 20
"""Size of a block of logits in the compute dtype. Smaller inputs use plain cross-entropy, which keeps the logits."""

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
    kernels: LossKernels
    shard: VocabShard | None = None
    """This rank's part of the vocabulary; None: all of it."""

    @property
    def table(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, labels_BT: Tensor | None = None, likeliest: bool = False) -> Tensor:
        """Return logits [B, T, V], or with labels their cross-entropy [B, T] in nats, in at least float32: 0 where a
        label is `IGNORED`. With `likeliest`, return the cross-entropy and the id of the likeliest word, [B, T, 2],
        without a gradient. All ranks of a `shard` get the same losses and ids.
        """
        if labels_BT is None:
            return self.gemm.linear(x_BTD, self.table)
        x_TD, labels_T = x_BTD.flatten(0, 1), labels_BT.flatten()
        if likeliest:
            return self._with_likeliest(x_TD, labels_T).view(*labels_BT.shape, 2)
        if x_TD.shape[0] * len(self.table) * self.gemm.compute_dtype.itemsize > _BLOCK_BYTES:
            losses_T: Tensor = _HeadLoss.apply(x_TD, self.table, labels_T, self.gemm, self.kernels, self.shard)
        else:
            losses_T = token_losses(self.gemm.linear(x_BTD, self.table).flatten(0, 1), labels_T, self.shard)
        # `_unsafe_view`, because FSDP2 warns about outputs that are views
        return torch.ops.aten._unsafe_view(losses_T, labels_BT.shape)

    @torch.no_grad()
    def _with_likeliest(self, x_TD: Tensor, labels_T: Tensor) -> Tensor:
        """Return the losses and the ids of the likeliest words, [T, 2]. Float32 has all ids below 2^24."""
        sums = _sums(self.gemm, self.kernels, x_TD, self.table, labels_T, self.shard, likeliest=True)
        lse_T, label_T = _log_sum_exp(sums, self.shard)
        return torch.stack([(lse_T - label_T) * (labels_T >= 0), _likeliest(sums, self.shard).to(lse_T.dtype)], 1)


class Head(_Head, Linear):
    """A head with a weight of its own."""

    def __init__(self, in_size: int, out_size: int, role: Role, gemms: LayerGemms) -> None:
        super().__init__(in_size, out_size, role, gemms)
        self.kernels = loss_kernels_for(gemms.kernels)

    @property
    def table(self) -> Tensor:
        return self.weight


class TiedHead(_Head):
    """A head whose weight is the embedding's."""

    def __init__(self, embedding: Embedding, gemms: LayerGemms) -> None:
        super().__init__()
        self.gemm = gemms.of(Products.head, Role.head.value)
        self.kernels = loss_kernels_for(gemms.kernels)
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


def _log_sum_exp(sums: LossSums, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp and the label's logit over the whole vocabulary, [T] each."""
    if shard is None:
        return sums.largest_T + sums.exponentials_T.log(), sums.label_T
    largest_T = sums.largest_T.clone()
    shard.max(largest_T)
    both_2T = torch.stack([sums.exponentials_T * (sums.largest_T - largest_T).exp(), sums.label_T])
    shard.sum(both_2T)
    return largest_T + both_2T[0].log(), both_2T[1]


def _likeliest(sums: LossSums, shard: VocabShard | None) -> Tensor:
    """Return the id of the likeliest word of the whole vocabulary, the first of equals, int64 [T]."""
    assert sums.likeliest_T is not None
    if shard is None:
        return sums.likeliest_T
    largest_T = sums.largest_T.clone()
    shard.max(largest_T)
    none = torch.iinfo(torch.int64).min
    negative_T = torch.where(sums.largest_T == largest_T, -sums.likeliest_T, none)
    shard.max(negative_T)
    return -negative_T


class _ShardedLoss(torch.autograd.Function):
    """The loss of logits that are sharded along the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, shard: VocabShard) -> Tensor:
        sums = LossSums.empty(labels_T, logits_TV.dtype)
        LossKernels().add(sums, logits_TV.clone(), labels_T, shard.start)
        lse_T, label_T = _log_sum_exp(sums, shard)
        ctx.save_for_backward(logits_TV, lse_T, labels_T)
        ctx.first = shard.start
        return (lse_T - label_T) * (labels_T >= 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, lse_T, labels_T = ctx.saved_tensors
        grad_T = grads[0] * (labels_T >= 0)
        return LossKernels().gradient(logits_TV.clone(), lse_T, grad_T, labels_T, ctx.first), None, None


class _HeadLoss(torch.autograd.Function):
    """The loss of a head's input, by blocks of tokens and words. The backward pass recomputes the logits, block by
    block: a third more work in the head, for memory that does not grow with the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_VD: Tensor,
        labels_T: Tensor,
        gemm: GemmBackend,
        kernels: LossKernels,
        shard: VocabShard | None,
    ) -> Tensor:
        lse_T, label_T = _log_sum_exp(_sums(gemm, kernels, x_TD, w_VD, labels_T, shard), shard)
        ctx.save_for_backward(x_TD, w_VD, lse_T, labels_T)
        ctx.gemm, ctx.kernels, ctx.start = gemm, kernels, 0 if shard is None else shard.start
        return (lse_T - label_T) * (labels_T >= 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x_TD, w_VD, lse_T, labels_T = ctx.saved_tensors
        gemm: GemmBackend = ctx.gemm
        grad_T, (needs_x, needs_w, *_) = grads[0] * (labels_T >= 0), ctx.needs_input_grad
        to_x = torch.zeros_like(x_TD, dtype=at_least_float32(x_TD.dtype)) if needs_x else None
        to_w = torch.empty_like(w_VD) if needs_w else None
        narrow_VD = gemm.narrowed(w_VD)
        for rows, blocks in _blocks(gemm, len(x_TD), len(w_VD)):
            w_WD, to_rows_WD = narrow_VD[rows], None
            for tokens in blocks:
                logits_NW, given = gemm.linear(x_TD[tokens], w_WD), (lse_T[tokens], grad_T[tokens], labels_T[tokens])
                grad_NW = ctx.kernels.gradient(logits_NW, *given, ctx.start + rows.start)
                del logits_NW
                if to_x is not None:
                    to_x[tokens].add_(gemm.input_gradient(grad_NW, w_WD))
                if needs_w:
                    part_WD = gemm.weight_gradient(grad_NW, x_TD[tokens])
                    to_rows_WD = part_WD if to_rows_WD is None else widened(to_rows_WD).add_(part_WD)
                    del part_WD
                del grad_NW  # before the next block is allocated
            if to_w is not None and to_rows_WD is not None:
                to_w[rows].copy_(to_rows_WD)
        return None if to_x is None else to_x.to(x_TD.dtype), to_w, None, None, None, None


def _sums(
    gemm: GemmBackend,
    kernels: LossKernels,
    x_TD: Tensor,
    w_VD: Tensor,
    labels_T: Tensor,
    shard: VocabShard | None,
    likeliest: bool = False,
) -> LossSums:
    """Return the sums over this rank's part of the vocabulary."""
    sums = LossSums.empty(labels_T, gemm.compute_dtype, likeliest)
    start, narrow_VD = 0 if shard is None else shard.start, gemm.narrowed(w_VD)
    for rows, blocks in _blocks(gemm, len(x_TD), len(w_VD)):
        for tokens in blocks:
            logits_NW = gemm.linear(x_TD[tokens], narrow_VD[rows])
            kernels.add(sums.of(tokens), logits_NW, labels_T[tokens], start + rows.start)
            del logits_NW
    return sums


def _blocks(gemm: GemmBackend, tokens: int, words: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield blocks of words, each with the blocks of tokens. Their logits fill `_BLOCK_BYTES`.

    The gradient of a token's hidden state is read and written once for each block of words, that of a word's row once
    for each block of tokens. Square blocks have the least of this traffic.
    """
    logits = _BLOCK_BYTES // gemm.compute_dtype.itemsize
    largest = max(math.isqrt(logits), logits // words, 1)
    size = -(-tokens // -(-tokens // largest))  # blocks of equal size
    width = max(logits // size // _MULTIPLE * _MULTIPLE, _MULTIPLE)
    blocks = [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]
    for begin in range(0, words, width):
        yield slice(begin, min(begin + width, words)), blocks
