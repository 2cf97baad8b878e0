"""The memory-bound steps of a mixture: tokens to the experts' order and back, and SwiGLU between two products.

Each is written twice, in PyTorch and as a Triton kernel that passes over its data once; tests hold the two against each
other. Sums and products are taken in at least float32 and rounded once. Nothing here is added in an order that could
change from run to run.

Two operations serve permute, unpermute and both of their backward passes, for each is the other's transpose:

    spread:   row[c]   = weight[slot of c] * token[slot of c // K], zero where c is padding
    collect:  token[t] = sum over k of weight[t, k] * row[place[t, k]]

The gradient of a weight is the product of its token and its row, summed over the width. It is taken while the two are
read for the other gradient.

Shapes: T tokens, D model width, K experts per token, S = T*K routed slots, C rows in the experts' order (the slots and
padding), F expert width.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from precision.config import KernelKind
from precision.gemm import at_least_float32, widened


class SortedSlots(NamedTuple):
    """Where slots lie among the experts' rows."""

    source_C: Tensor
    """Which slot (token * K + k) each row holds, int64. What padding names is not used."""
    place_TK: Tensor
    """Which row holds each slot, int64."""
    is_padding_C1: Tensor | None = None
    """Which rows are padding, bool; None: none is."""


class MoEKernels:
    """Differentiable steps. A subclass says who computes `spread`, `collect` and the two halves of SwiGLU."""

    def permute(self, x_TD: Tensor, places: SortedSlots, weights_TK: Tensor | None = None) -> Tensor:
        """Tokens in the experts' order [C, D], times their routing weights if these are given; padding is zero."""
        return _Permute.apply(x_TD, weights_TK, places, self)

    def unpermute(self, y_CD: Tensor, places: SortedSlots, weights_TK: Tensor | None = None) -> Tensor:
        """The sum of each token's K rows [T, D], times their routing weights if these are given. What padding holds is
        not read, and its gradient is zero.
        """
        return _Unpermute.apply(y_CD, weights_TK, places, self)

    def swiglu(self, gate_CF: Tensor, up_CF: Tensor) -> Tensor:
        """silu(gate) * up (Shazeer 2020). Either may be a part of a wider tensor."""
        return _SwiGLU.apply(gate_CF.flatten(0, -2), up_CF.flatten(0, -2), self).view(gate_CF.shape)

    def swiglu_halves(self, gate_up_C2F: Tensor) -> Tensor:
        """`swiglu` of the left half of each row and its right half. By itself, because autograd would put the gradients
        of two views together by copying them.
        """
        return _FusedSwiGLU.apply(gate_up_C2F.flatten(0, -2), self).unflatten(0, gate_up_C2F.shape[:-1])

    def spread(
        self, x_TD: Tensor, places: SortedSlots, weights_TK: Tensor | None, y_CD: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows [C, D]; with `y_CD` also <token, row> of each slot, [T, K] in the format of weights."""
        raise NotImplementedError

    def collect(
        self, y_CD: Tensor, places: SortedSlots, weights_TK: Tensor | None, x_TD: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [T, D]; with `x_TD` also <token, row> of each slot, [T, K] in the format of weights."""
        raise NotImplementedError

    def swiglu_forward(self, gate_CF: Tensor, up_CF: Tensor) -> Tensor:
        raise NotImplementedError

    def swiglu_backward(self, grad_CF: Tensor, gate_CF: Tensor, up_CF: Tensor, into: tuple[Tensor, Tensor]) -> None:
        """Write the gradients of gate and up into two tensors."""
        raise NotImplementedError


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor | None, places: SortedSlots, kernels: MoEKernels) -> Tensor:
        ctx.places, ctx.kernels = places, kernels
        ctx.save_for_backward(weights_TK, None if weights_TK is None else x_TD)
        return kernels.spread(x_TD, places, weights_TK, None)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        weights_TK, x_TD = ctx.saved_tensors
        return *ctx.kernels.collect(grads[0].contiguous(), ctx.places, weights_TK, x_TD), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_CD: Tensor, weights_TK: Tensor | None, places: SortedSlots, kernels: MoEKernels) -> Tensor:
        ctx.places, ctx.kernels = places, kernels
        ctx.save_for_backward(weights_TK, None if weights_TK is None else y_CD)
        return kernels.collect(y_CD, places, weights_TK, None)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        weights_TK, y_CD = ctx.saved_tensors
        return *ctx.kernels.spread(grads[0].contiguous(), ctx.places, weights_TK, y_CD), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_CF: Tensor, up_CF: Tensor, kernels: MoEKernels) -> Tensor:
        ctx.save_for_backward(gate_CF, up_CF)
        ctx.kernels = kernels
        return kernels.swiglu_forward(gate_CF, up_CF)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_CF, up_CF = ctx.saved_tensors
        found = grads[0].new_empty(gate_CF.shape), grads[0].new_empty(up_CF.shape)
        ctx.kernels.swiglu_backward(grads[0].contiguous(), gate_CF, up_CF, found)
        return *found, None


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_C2F: Tensor, kernels: MoEKernels) -> Tensor:
        ctx.save_for_backward(gate_up_C2F)
        ctx.kernels = kernels
        return kernels.swiglu_forward(*_halves(gate_up_C2F))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up_C2F,) = ctx.saved_tensors
        found_C2F = grads[0].new_empty(gate_up_C2F.shape)
        ctx.kernels.swiglu_backward(grads[0].contiguous(), *_halves(gate_up_C2F), _halves(found_C2F))
        return found_C2F, None


def _halves(both_C2F: Tensor) -> tuple[Tensor, Tensor]:
    left, right = both_C2F.chunk(2, dim=-1)
    return left, right


class TorchKernels(MoEKernels):
    """What the kernels compute, in PyTorch."""

    def spread(
        self, x_TD: Tensor, places: SortedSlots, weights_TK: Tensor | None, y_CD: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        rows_CD = x_TD.index_select(0, places.source_C // places.place_TK.shape[1])
        if weights_TK is not None:
            weights_C1 = weights_TK.flatten().index_select(0, places.source_C)[:, None]
            rows_CD = (rows_CD.to(at_least_float32(x_TD.dtype)) * weights_C1).to(x_TD.dtype)
        if places.is_padding_C1 is not None:
            rows_CD = rows_CD.masked_fill_(places.is_padding_C1, 0)
        return rows_CD, None if y_CD is None else _products(x_TD, _rows_of_tokens(y_CD, places), weights_TK)

    def collect(
        self, y_CD: Tensor, places: SortedSlots, weights_TK: Tensor | None, x_TD: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        rows_TKD = _rows_of_tokens(y_CD, places)
        weighted_TKD = rows_TKD if weights_TK is None else rows_TKD * weights_TK[..., None]
        return weighted_TKD.sum(1).to(y_CD.dtype), None if x_TD is None else _products(x_TD, rows_TKD, weights_TK)

    def swiglu_forward(self, gate_CF: Tensor, up_CF: Tensor) -> Tensor:
        wide = at_least_float32(gate_CF.dtype)
        return (F.silu(gate_CF.to(wide)) * up_CF.to(wide)).to(gate_CF.dtype)

    def swiglu_backward(self, grad_CF: Tensor, gate_CF: Tensor, up_CF: Tensor, into: tuple[Tensor, Tensor]) -> None:
        grad_CF, gate_CF, up_CF = (widened(x) for x in (grad_CF, gate_CF, up_CF))
        sigmoid_CF = gate_CF.sigmoid()
        into[0].copy_(grad_CF * up_CF * sigmoid_CF * (1 + gate_CF * (1 - sigmoid_CF)))
        into[1].copy_(grad_CF * gate_CF * sigmoid_CF)


def _rows_of_tokens(y_CD: Tensor, places: SortedSlots) -> Tensor:
    """[T, K, D], in at least float32."""
    rows_SD = y_CD.index_select(0, places.place_TK.flatten())
    return rows_SD.view(*places.place_TK.shape, y_CD.shape[1]).to(at_least_float32(y_CD.dtype))


def _products(x_TD: Tensor, rows_TKD: Tensor, weights_TK: Tensor | None) -> Tensor:
    """<token, row> of each slot [T, K]."""
    assert weights_TK is not None
    return (x_TD[:, None].to(rows_TKD.dtype) * rows_TKD).sum(-1).to(weights_TK.dtype)


class TritonKernels(MoEKernels):
    """The same by Triton, on a GPU or, where TRITON_INTERPRET=1 was set before Triton was first imported, step by step
    on a CPU.
    """

    def spread(
        self, x_TD: Tensor, places: SortedSlots, weights_TK: Tensor | None, y_CD: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        rows_CD = x_TD.new_empty(len(places.source_C), x_TD.shape[1])
        found_TK = None if y_CD is None or weights_TK is None else torch.empty_like(weights_TK)
        is_padding_C1 = None if places.is_padding_C1 is None else places.is_padding_C1.view(torch.uint8)
        given = [_dense(t) for t in (x_TD, y_CD, weights_TK, places.source_C, is_padding_C1)]
        sizes = {"K": places.place_TK.shape[1], **_sizes(x_TD)}
        if rows_CD.numel():
            _spread_kernel()[(len(rows_CD),)](*given, rows_CD, found_TK, WIDTH=x_TD.shape[1], **sizes)
        return rows_CD, found_TK

    def collect(
        self, y_CD: Tensor, places: SortedSlots, weights_TK: Tensor | None, x_TD: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        (tokens, top_k), width = places.place_TK.shape, y_CD.shape[1]
        tokens_TD = y_CD.new_empty(tokens, width)
        found_TK = None if x_TD is None or weights_TK is None else torch.empty_like(weights_TK)
        given = [_dense(t) for t in (y_CD, x_TD, weights_TK, places.place_TK)]
        if tokens_TD.numel():
            sizes = {"K": top_k, "SLOTS": _power_of_two(top_k), **_sizes(y_CD)}
            _collect_kernel()[(tokens,)](*given, tokens_TD, found_TK, WIDTH=width, **sizes)
        return tokens_TD, found_TK

    def swiglu_forward(self, gate_CF: Tensor, up_CF: Tensor) -> Tensor:
        out_CF = torch.empty_like(gate_CF, memory_format=torch.contiguous_format)
        _by_element(_swiglu_kernel, gate_CF, up_CF, out_CF)
        return out_CF

    def swiglu_backward(self, grad_CF: Tensor, gate_CF: Tensor, up_CF: Tensor, into: tuple[Tensor, Tensor]) -> None:
        _by_element(_swiglu_backward_kernel, grad_CF, gate_CF, up_CF, *into)


def made(kind: KernelKind) -> MoEKernels | None:
    """What does these steps; None: plain code where they are needed, which autograd goes through (`model.moe`)."""
    return TritonKernels() if kind is KernelKind.triton else None


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _power_of_two(size: int) -> int:
    """The smallest that is not below `size`; tiles must have such sides."""
    return 1 << (size - 1).bit_length()


def _sizes(x: Tensor) -> dict[str, Any]:
    """How much of a row is in hand at a time, and by how many warps. 8 elements per thread: 16 bytes of bfloat16."""
    import triton.language as tl

    block = min(_power_of_two(x.shape[-1]), 1024)
    wide = tl.float64 if at_least_float32(x.dtype) is torch.float64 else tl.float32
    return {"BLOCK": block, "WIDE": wide, "num_warps": max(block // 256, 1)}


def _by_element(kernel: Any, *tensors: Tensor) -> None:
    """Launch over tensors [C, F] of equal shape, whose rows may lie apart."""
    assert all(x.stride(-1) == 1 for x in tensors), "rows must be dense"
    rows, width = tensors[0].shape
    sizes = _sizes(tensors[0])
    if rows and width:
        grid = (rows, -(-width // sizes["BLOCK"]))
        kernel()[grid](*tensors, *(x.stride(0) for x in tensors), width, **sizes)


# Triton is imported where a kernel is first asked for: a machine without a GPU needs none. A kernel's name for a
# pointer is that of the tensor; an argument that is None, and what depends on it, is not in the compiled kernel. Widths
# are compiled in: a model has few, and the interpreter of Triton 3.6 cannot count up to a number that is not.


@cache
def _spread_kernel() -> Any:
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

    return spread


@cache
def _collect_kernel() -> Any:
    import triton
    import triton.language as tl

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

    return collect


@cache
def _swiglu_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def swiglu(  # type: ignore[no-untyped-def]
        gate, up, out, gate_apart, up_apart, out_apart, width, BLOCK: tl.constexpr, WIDE: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = columns < width
        g = tl.load(gate + row * gate_apart + columns, mask=here, other=0).to(WIDE)
        u = tl.load(up + row * up_apart + columns, mask=here, other=0).to(WIDE)
        tl.store(out + row * out_apart + columns, g / (1 + tl.exp(-g)) * u, mask=here)

    return swiglu


@cache
def _swiglu_backward_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def swiglu_backward(  # type: ignore[no-untyped-def]
        grad, gate, up, to_gate, to_up, grad_apart, gate_apart, up_apart, to_gate_apart, to_up_apart, width,
        BLOCK: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = columns < width
        d = tl.load(grad + row * grad_apart + columns, mask=here, other=0).to(WIDE)
        g = tl.load(gate + row * gate_apart + columns, mask=here, other=0).to(WIDE)
        u = tl.load(up + row * up_apart + columns, mask=here, other=0).to(WIDE)
        sigmoid = 1 / (1 + tl.exp(-g))
        tl.store(to_gate + row * to_gate_apart + columns, d * u * sigmoid * (1 + g * (1 - sigmoid)), mask=here)
        tl.store(to_up + row * to_up_apart + columns, d * g * sigmoid, mask=here)

    return swiglu_backward
