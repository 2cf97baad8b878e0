"""Triton kernels of the loss of a block of logits: each reads the logits as they are, and one launch does it all.

Shapes: T tokens, W words of a block.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from model.kernels.loss import LossKernels, LossSums
from model.kernels.triton import OPS, define_operator, launch_sizes


class TritonLossKernels(LossKernels):
    """Computes in at least float32, without a copy of the logits."""

    def add(self, sums: LossSums, logits_TW: Tensor, labels_T: Tensor, first: int) -> None:
        OPS.loss_sums(logits_TW, labels_T, first, *sums)

    def gradient(self, logits_TW: Tensor, lse_T: Tensor, grad_T: Tensor, labels_T: Tensor, first: int) -> Tensor:
        OPS.loss_gradient(logits_TW, lse_T, grad_T, labels_T, first)
        return logits_TW


def _sums(
    logits: Tensor, labels: Tensor, first: int, largest: Tensor, exponentials: Tensor, label: Tensor,
    likeliest: Tensor | None,
) -> None:  # fmt: skip
    assert logits.is_contiguous(), "rows must be dense"
    if logits.numel():
        given = logits, labels, largest, exponentials, label, likeliest, first
        _loss_kernels()[0][(len(logits),)](*given, WIDTH=logits.shape[1], **launch_sizes(logits))


def _gradient(logits: Tensor, lse: Tensor, grad: Tensor, labels: Tensor, first: int) -> None:
    assert logits.is_contiguous(), "rows must be dense"
    if logits.numel():
        chosen = launch_sizes(logits)
        grid = len(logits), -(-logits.shape[1] // chosen["BLOCK"])
        _loss_kernels()[1][grid](logits, lse, grad, labels, first, WIDTH=logits.shape[1], **chosen)


define_operator(
    "loss_sums(Tensor logits, Tensor labels, int first, Tensor(a!) largest, Tensor(b!) exponentials, Tensor(c!) label, "
    "Tensor(d!)? likeliest) -> ()",
    _sums,
    lambda *given: None,
)
define_operator(
    "loss_gradient(Tensor(a!) logits, Tensor lse, Tensor grad, Tensor labels, int first) -> ()",
    _gradient,
    lambda *given: None,
)


@cache
def _loss_kernels() -> tuple[Any, Any]:
    """Build the kernels of the sums and of the gradient. A program of the first processes a token."""
    import triton
    import triton.language as tl

    @triton.jit
    def loss_sums(  # type: ignore[no-untyped-def]
        logits, labels, largest, exponentials, label, likeliest, first,
        WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        # what is overwritten below is read here: the reductions wait for all threads
        before, total, mine = tl.load(largest + row), tl.load(exponentials + row), tl.load(label + row)
        place = tl.load(labels + row) - first
        here = (place >= 0) & (place < WIDTH)
        mine += tl.load(logits + row * WIDTH + place, mask=here, other=0).to(WIDE)
        lanes = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], float("-inf"), WIDE)
        for start in range(0, WIDTH, BLOCK):
            columns = start + lanes
            x = tl.load(logits + row * WIDTH + columns, mask=columns < WIDTH, other=float("-inf")).to(WIDE)
            best = tl.maximum(best, x)
        top = tl.max(best, 0)
        now = tl.maximum(before, top)
        parts, words = tl.zeros([BLOCK], WIDE), tl.full([BLOCK], WIDTH, tl.int32)
        for start in range(0, WIDTH, BLOCK):
            columns = start + lanes
            x = tl.load(logits + row * WIDTH + columns, mask=columns < WIDTH, other=float("-inf")).to(WIDE)
            parts += tl.exp(x - now)
            if likeliest is not None:
                words = tl.minimum(words, tl.where(x == top, columns, WIDTH))
        tl.store(exponentials + row, total * tl.exp(before - now) + tl.sum(parts, 0))
        tl.store(largest + row, now)
        tl.store(label + row, mine)
        if likeliest is not None:
            tl.store(likeliest + row, first + tl.min(words, 0), mask=top > before)

    @triton.jit
    def loss_gradient(  # type: ignore[no-untyped-def]
        logits, lse, grad, labels, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = columns < WIDTH
        x = tl.load(logits + row * WIDTH + columns, mask=here, other=0).to(WIDE)
        y = tl.exp(x - tl.load(lse + row))
        y = tl.where(columns == tl.load(labels + row) - first, y - 1, y) * tl.load(grad + row)
        tl.store(logits + row * WIDTH + columns, y, mask=here)

    return loss_sums, loss_gradient
