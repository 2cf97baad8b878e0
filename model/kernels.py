"""The memory-bound steps of an MoE layer: permute tokens by expert, unpermute them, and compute SwiGLU in between.

`TorchKernels` uses PyTorch operations. `TritonKernels` reads and writes the data once; it computes in at least float32
and rounds once. No sum depends on the order in which threads run.

Two operations serve permute, unpermute and both backward passes, because each is the transpose of the other:

    spread:   row[c]   = weight[slot of c] * token[slot of c // K], zero where c is padding
    collect:  token[t] = sum over k of weight[t, k] * row[place[t, k]]

The gradient of a weight is the dot product of its token and its row. The backward pass computes it together with the
other gradient, which reads both.

Shapes: T tokens, D hidden size, K experts per token, S = T*K routed slots, C rows sorted by expert (slots and padding),
F expert hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from precision.config import KernelKind
from precision.gemm import Groups, at_least_float32


class SortedSlots(NamedTuple):
    """Positions of routed slots among rows sorted by expert. Each expert's rows may be padded for the GEMM."""

    source_C: Tensor
    """Slot (token * K + k) of each row, int64; arbitrary for padding rows."""
    place_TK: Tensor
    """Row of each slot, int64."""
    groups: Groups
    """Rows of each expert, padding included."""
    is_padding_C1: Tensor | None = None
    """Whether each row is padding, bool; None without padding."""

    @property
    def top_k(self) -> int:
        return self.place_TK.shape[1]


MovedRows = tuple[Tensor, Tensor | None]
"""Rows or tokens, and the dot product <token, row> of each slot if requested: [T, K] in the dtype of the weights."""
RowsOp = Callable[[Tensor, SortedSlots, Tensor | None, Tensor | None], MovedRows]


class MoEKernels:
    """The three steps as differentiable operations. Subclasses implement `spread`, `collect` and the SwiGLU passes."""

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
    def forward(ctx: Any, kernels: MoEKernels, *inputs: Tensor) -> Tensor:
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


class TorchKernels(MoEKernels):
    """PyTorch operations, each rounded to the dtype of its input."""

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
    """Return the rows of each token [T, K, D]."""
    return y_CD.index_select(0, slots.place_TK.flatten()).view(*slots.place_TK.shape, y_CD.shape[1])


def _dot_products(x_TD: Tensor, rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the dot product <token, row> of each slot [T, K]."""
    return (x_TD[:, None] * rows_TKD).sum(-1).to(weights_TK.dtype)


class TritonKernels(MoEKernels):
    """Triton kernels, for GPUs. They run on a CPU if TRITON_INTERPRET=1 was set before Triton was first imported."""

    def spread(self, x_TD: Tensor, slots: SortedSlots, weights_TK: Tensor | None, y_CD: Tensor | None) -> MovedRows:
        rows_CD = x_TD.new_empty(len(slots.source_C), x_TD.shape[1])
        found_TK = None if y_CD is None or weights_TK is None else torch.empty_like(weights_TK)
        is_padding_C1 = None if slots.is_padding_C1 is None else slots.is_padding_C1.view(torch.uint8)
        given = [_dense(t) for t in (x_TD, y_CD, weights_TK, slots.source_C, is_padding_C1)]
        sizes = {"K": slots.top_k, **_sizes(x_TD)}
        if rows_CD.numel():
            _permute_kernels()[0][(len(rows_CD),)](*given, rows_CD, found_TK, WIDTH=x_TD.shape[1], **sizes)
        return rows_CD, found_TK

    def collect(self, y_CD: Tensor, slots: SortedSlots, weights_TK: Tensor | None, x_TD: Tensor | None) -> MovedRows:
        (tokens, top_k), width = slots.place_TK.shape, y_CD.shape[1]
        tokens_TD = y_CD.new_empty(tokens, width)
        found_TK = None if x_TD is None or weights_TK is None else torch.empty_like(weights_TK)
        given = [_dense(t) for t in (y_CD, x_TD, weights_TK, slots.place_TK)]
        if tokens_TD.numel():
            sizes = {"K": top_k, "SLOTS": _power_of_two(top_k), **_sizes(y_CD)}
            _permute_kernels()[1][(tokens,)](*given, tokens_TD, found_TK, WIDTH=width, **sizes)
        return tokens_TD, found_TK

    def swiglu_forward(self, gate_CF: Tensor, up_CF: Tensor) -> tuple[Tensor, Tensor | None]:
        out_CF = torch.empty_like(gate_CF, memory_format=torch.contiguous_format)
        _launch_by_element(_swiglu_kernels()[0], gate_CF, up_CF, out_CF)
        return out_CF, None

    def swiglu_backward(self, grad_CF: Tensor, saved: Sequence[Tensor | None], into: Sequence[Tensor]) -> None:
        _launch_by_element(_swiglu_kernels()[1], grad_CF, *(x for x in saved if x is not None), *into)


def kernels_for(kind: KernelKind) -> MoEKernels:
    return {KernelKind.torch: TorchKernels, KernelKind.triton: TritonKernels}[kind]()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _power_of_two(size: int) -> int:
    """Return the smallest power of two >= `size`. Triton's blocks must have such sizes."""
    return 1 << (size - 1).bit_length()


def _sizes(x: Tensor) -> dict[str, Any]:
    """Return a kernel's block size, accumulation type and warps. Each thread gets 8 elements (16 bytes of bf16)."""
    import triton.language as tl

    block = min(_power_of_two(x.shape[-1]), 1024)
    wide = tl.float64 if at_least_float32(x.dtype) is torch.float64 else tl.float32
    return {"BLOCK": block, "WIDE": wide, "num_warps": max(block // 256, 1)}


def _launch_by_element(kernel: Any, *tensors: Tensor) -> None:
    """Launch over tensors [C, F] of equal shape; rows may be strided."""
    assert all(x.stride(-1) == 1 for x in tensors), "rows must be dense"
    rows, width = tensors[0].shape
    sizes = _sizes(tensors[0])
    if rows and width:
        grid = (rows, -(-width // sizes["BLOCK"]))
        kernel[grid](*tensors, *(x.stride(0) for x in tensors), width, **sizes)


# Triton is imported at the first use of a kernel, so a machine without a GPU does not need it. Pointers carry the names
# of their tensors. An argument that is None, and the code that depends on it, is compiled out. Widths are compile-time
# constants: a model has few, and the interpreter of Triton 3.6 cannot loop up to a run-time number.


@cache
def _permute_kernels() -> tuple[Any, Any]:
    """Build the kernels of `spread` and `collect`."""
    import triton
    import triton.language as tl

    @triton.jit
    def spread(  # type: ignore[no-untyped-def]
        x, y, weights, source, is_padding, rows, found,
        WIDTH: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        slot = tl.load(source + row)
        real = tl.load(is_padding + row) == 0 if is_padding is not None else True
        token = slot // K
        weight = tl.load(weights + slot, mask=real, other=0).to(WIDE) if weights is not None else 1.0
        product = tl.zeros([BLOCK], WIDE)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            here = (columns < WIDTH) & real
            part = tl.load(x + token * WIDTH + columns, mask=here, other=0)
            if weights is not None:
                wide = part.to(WIDE)
                if y is not None:
                    product += wide * tl.load(y + row * WIDTH + columns, mask=here, other=0).to(WIDE)
                part = wide * weight
            tl.store(rows + row * WIDTH + columns, part, mask=columns < WIDTH)
        if y is not None:
            tl.store(found + slot, tl.sum(product, 0), mask=real)

    @triton.jit
    def collect(  # type: ignore[no-untyped-def]
        y, x, weights, place, tokens, found,
        WIDTH: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        slots = tl.arange(0, SLOTS)
        products = tl.zeros([SLOTS], WIDE)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            here = columns < WIDTH
            total = tl.zeros([BLOCK], WIDE)
            if x is not None:
                mine = tl.load(x + token * WIDTH + columns, mask=here, other=0).to(WIDE)
            for k in tl.static_range(K):
                row = tl.load(place + token * K + k)
                part = tl.load(y + row * WIDTH + columns, mask=here, other=0).to(WIDE)
                if x is not None:
                    products += tl.where(slots == k, tl.sum(part * mine, 0), 0)
                if weights is not None:
                    part = part * tl.load(weights + token * K + k).to(WIDE)
                total += part
            tl.store(tokens + token * WIDTH + columns, total, mask=here)
        if x is not None:
            tl.store(found + token * K + slots, products, mask=slots < K)

    return spread, collect


@cache
def _swiglu_kernels() -> tuple[Any, Any]:
    """Build the kernels of the forward and the backward pass."""
    import triton
    import triton.language as tl

    @triton.jit
    def swiglu(  # type: ignore[no-untyped-def]
        gate, up, out, gate_stride, up_stride, out_stride, width, BLOCK: tl.constexpr, WIDE: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = columns < width
        g = tl.load(gate + row * gate_stride + columns, mask=here, other=0).to(WIDE)
        u = tl.load(up + row * up_stride + columns, mask=here, other=0).to(WIDE)
        tl.store(out + row * out_stride + columns, g / (1 + tl.exp(-g)) * u, mask=here)

    @triton.jit
    def swiglu_backward(  # type: ignore[no-untyped-def]
        grad, gate, up, to_gate, to_up, grad_stride, gate_stride, up_stride, to_gate_stride, to_up_stride, width,
        BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = columns < width
        d = tl.load(grad + row * grad_stride + columns, mask=here, other=0).to(WIDE)
        g = tl.load(gate + row * gate_stride + columns, mask=here, other=0).to(WIDE)
        u = tl.load(up + row * up_stride + columns, mask=here, other=0).to(WIDE)
        sigmoid = 1 / (1 + tl.exp(-g))
        tl.store(to_gate + row * to_gate_stride + columns, d * u * sigmoid * (1 + g * (1 - sigmoid)), mask=here)
        tl.store(to_up + row * to_up_stride + columns, d * g * sigmoid, mask=here)

    return swiglu, swiglu_backward
