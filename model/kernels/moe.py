"""The memory-bound steps of a layer: norm, heads, permute tokens by expert, unpermute them, and SwiGLU in between.

`TorchKernels` uses PyTorch operations; `model.kernels.triton` has kernels for GPUs. No sum depends on the order in
which threads run.

Two operations serve permute, unpermute and both backward passes, because each is the transpose of the other:

    spread:   row[c]   = weight[slot of c] * token[slot of c // K], zero where c is padding
    collect:  token[t] = sum over k of weight[t, k] * row[place[t, k]], without slots that have no row

The gradient of a weight is the dot product of its token and its row. The backward pass computes it together with the
other gradient, which reads both.

Shapes: T tokens, D hidden size, K experts per token, S = T*K routed slots, C rows sorted by expert (slots and padding),
F expert hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.heads import HeadStep, rms_normalise, scale_queries, turn
from precision.gemm import Groups, at_least_float32


class SortedSlots(NamedTuple):
    """Positions of routed slots among rows sorted by expert. Each expert's rows may be padded for the GEMM."""

    source_C: Tensor
    """Slot (token * K + k) of each row, int64; arbitrary for padding rows."""
    place_TK: Tensor
    """Row of each slot, int64; -1 for a slot without a row."""
    groups: Groups
    """Rows of each expert, padding included."""
    is_padding_C1: Tensor | None = None
    """Whether each row is padding, bool; None without padding."""
    is_partial: bool = False
    """Whether slots may have no row. Such a slot adds nothing, and the gradient of its weight is zero."""

    @property
    def top_k(self) -> int:
        return self.place_TK.shape[1]


MovedRows = tuple[Tensor, Tensor | None]
"""Rows or tokens, and the dot product <token, row> of each slot if requested: [T, K] in the dtype of the weights."""
RowsOp = Callable[[Tensor, SortedSlots, Tensor | None, Tensor | None], MovedRows]


class StepKernels:
    """The steps as differentiable operations. Subclasses implement `rms_norm`, `spread`, `collect` and the SwiGLU
    passes.
    """

    joins = False
    """Whether matmuls with the same input are computed as one."""

    def rms_norm(self, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        """Return x / rms(x) over the last dimension in at least float32, times the gain, in the dtype of `x`."""
        raise NotImplementedError

    def heads(
        self, qkv_BTX: Tensor, step: HeadStep, rotation: Tensor | None, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, H, K], keys and values [B, T, G, K] from one row of all heads, [B, T, (H + 2 G) K].
        `rotation` and `temperature` are those of the positions; None: without.
        """
        q, k, v = qkv_BTX.unflatten(-1, (-1, step.head_dim)).split(step.heads, 2)
        return scale_queries(turn(q, step, rotation), step, temperature), turn(k, step, rotation), v

    def permute(self, x_TD: Tensor, slots: SortedSlots, weights_TK: Tensor | None = None) -> Tensor:
        """Copy tokens to their rows [C, D], times their routing weights if given; padding is zero."""
        if not torch.is_grad_enabled():
            return self.spread(x_TD, slots, weights_TK, None)[0]
        return _Permute.apply(x_TD, weights_TK, slots, self.spread, self.collect)

    def unpermute(self, y_CD: Tensor, slots: SortedSlots, weights_TK: Tensor | None = None) -> Tensor:
        """Sum each token's K rows [T, D], times their routing weights if given. Padding is not read; its gradient is
        zero.
        """
        if not torch.is_grad_enabled():
            return self.collect(y_CD, slots, weights_TK, None)[0]
        return _Permute.apply(y_CD, weights_TK, slots, self.collect, self.spread)

    def swiglu(self, gate_CF: Tensor, up_CF: Tensor) -> Tensor:
        """Return silu(gate) * up (Shazeer 2020). Either may be a view of a wider tensor."""
        return _SwiGLU.apply(self, gate_CF.flatten(0, -2), up_CF.flatten(0, -2)).view(gate_CF.shape)

    def swiglu_halves(self, gate_up_C2F: Tensor) -> Tensor:
        """Apply `swiglu` to the left and right half of each row. For two views, autograd would copy both gradients."""
        return _SwiGLU.apply(self, gate_up_C2F.flatten(0, -2)).unflatten(0, gate_up_C2F.shape[:-1])

    def spread(self, x_TD: Tensor, slots: SortedSlots, weights_TK: Tensor | None, y_CD: Tensor | None) -> MovedRows:
        """Return rows [C, D]; with `y_CD` and weights, also the dot products."""
        raise NotImplementedError

    def collect(self, y_CD: Tensor, slots: SortedSlots, weights_TK: Tensor | None, x_TD: Tensor | None) -> MovedRows:
        """Return tokens [T, D]; with `x_TD` and weights, also the dot products."""
        raise NotImplementedError

    def swiglu_forward(self, gate_CF: Tensor, up_CF: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return silu(gate) * up, and silu(gate) if the backward pass needs it."""
        raise NotImplementedError

    def swiglu_backward(self, grad_CF: Tensor, saved: Sequence[Tensor | None], into: Sequence[Tensor]) -> None:
        """Write the gradients of gate and up `into` two tensors. `saved`: silu(gate) or None, gate and up."""
        raise NotImplementedError


class _Permute(torch.autograd.Function):
    """`forward_op` is `spread` or `collect`, `backward_op` the other one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights_TK: Tensor | None, slots: SortedSlots, forward_op: RowsOp, backward_op: RowsOp
    ) -> Tensor:
        ctx.slots, ctx.backward_op = slots, backward_op
        ctx.save_for_backward(weights_TK, None if weights_TK is None else x)
        return forward_op(x, slots, weights_TK, None)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        weights_TK, x = ctx.saved_tensors
        return *ctx.backward_op(grads[0].contiguous(), ctx.slots, weights_TK, x), None, None, None


class _SwiGLU(torch.autograd.Function):
    """The inputs are gate and up, or one tensor with gate in the left half of each row and up in the right half."""

    @staticmethod
    def forward(ctx: Any, kernels: StepKernels, *inputs: Tensor) -> Tensor:
        out_CF, silu_CF = kernels.swiglu_forward(*_gate_and_up(inputs))
        ctx.kernels = kernels
        ctx.save_for_backward(silu_CF, *inputs)
        return out_CF

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        silu_CF, *inputs = ctx.saved_tensors
        gradients = [grads[0].new_empty(x.shape) for x in inputs]
        saved = silu_CF, *_gate_and_up(inputs)
        ctx.kernels.swiglu_backward(grads[0].contiguous(), saved, _gate_and_up(gradients))
        return None, *gradients


def _gate_and_up(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors if len(tensors) == 2 else tensors[0].chunk(2, dim=-1)


class TorchKernels(StepKernels):
    """PyTorch operations, each rounded to the dtype of its input."""

    def rms_norm(self, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        if gain is None:
            return rms_normalise(x, eps)
        if x.dtype is gain.dtype is at_least_float32(x.dtype) and not torch.is_grad_enabled():
            return torch.rms_norm(x, gain.shape, gain, eps)  # the same in one call
        return rms_normalise(x, eps) * gain.to(x.dtype)

    def swiglu(self, gate_CF: Tensor, up_CF: Tensor) -> Tensor:
        return F.silu(gate_CF) * up_CF

    def swiglu_halves(self, gate_up_C2F: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler joins the gradients by itself
            return self.swiglu(*_gate_and_up([gate_up_C2F]))
        return super().swiglu_halves(gate_up_C2F)

    def spread(self, x_TD: Tensor, slots: SortedSlots, weights_TK: Tensor | None, y_CD: Tensor | None) -> MovedRows:
        rows_CD = x_TD.index_select(0, slots.source_C // slots.top_k if slots.top_k > 1 else slots.source_C)
        if weights_TK is not None:
            rows_CD.mul_(weights_TK.to(x_TD.dtype).flatten().index_select(0, slots.source_C)[:, None])
        if slots.is_padding_C1 is not None:
            rows_CD.masked_fill_(slots.is_padding_C1, 0)
        if y_CD is None or weights_TK is None:
            return rows_CD, None
        return rows_CD, _dot_products(x_TD, _rows_of_tokens(y_CD, slots), weights_TK)

    def collect(self, y_CD: Tensor, slots: SortedSlots, weights_TK: Tensor | None, x_TD: Tensor | None) -> MovedRows:
        rows_TKD = _rows_of_tokens(y_CD, slots)
        products_TK = None
        if weights_TK is not None:
            products_TK = None if x_TD is None else _dot_products(x_TD, rows_TKD, weights_TK)
            rows_TKD.mul_(weights_TK.to(y_CD.dtype)[..., None])
        return rows_TKD.squeeze(1) if slots.top_k == 1 else rows_TKD.sum(1), products_TK

    def swiglu_forward(self, gate_CF: Tensor, up_CF: Tensor) -> tuple[Tensor, Tensor | None]:
        silu_CF = F.silu(gate_CF)
        return silu_CF * up_CF, silu_CF

    def swiglu_backward(self, grad_CF: Tensor, saved: Sequence[Tensor | None], into: Sequence[Tensor]) -> None:
        silu_CF, gate_CF, up_CF = saved
        to_gate, to_up = into
        assert silu_CF is not None and up_CF is not None
        torch.mul(grad_CF, silu_CF, out=to_up)
        torch.mul(grad_CF, up_CF, out=to_gate)
        torch.ops.aten.silu_backward.grad_input(to_gate, gate_CF, grad_input=to_gate)


def _rows_of_tokens(y_CD: Tensor, slots: SortedSlots) -> Tensor:
    """Return the rows of each token [T, K, D], zero for slots without a row."""
    shape = (*slots.place_TK.shape, y_CD.shape[1])
    if not slots.is_partial:
        return y_CD.index_select(0, slots.place_TK.flatten()).view(shape)
    if not len(y_CD):
        return y_CD.new_zeros(shape)
    rows_TKD = y_CD.index_select(0, slots.place_TK.flatten().clamp(min=0)).view(shape)
    return rows_TKD.masked_fill_((slots.place_TK < 0)[..., None], 0)


def _dot_products(x_TD: Tensor, rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the dot product <token, row> of each slot [T, K]."""
    return (x_TD[:, None] * rows_TKD).sum(-1).to(weights_TK.dtype)
