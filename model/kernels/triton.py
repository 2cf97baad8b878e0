"""Triton kernels of the layers' memory-bound steps, for GPUs.

They run on a CPU if TRITON_INTERPRET=1 was set before Triton was first imported. Each is an operator of the namespace
`leviathan` with a shape function, so that a layer can be traced, counted and walked on meta tensors without a GPU.

Shapes: T tokens, D hidden size, K experts per token or head dim, C rows sorted by expert, F expert hidden size, H query
heads, G key/value heads, N = H + 2 G heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.config import RopePairing
from model.kernels.heads import HeadStep
from model.kernels.moe import MovedRows, SortedSlots, StepKernels
from precision.gemm import at_least_float32, widened


class TritonKernels(StepKernels):
    """Reads and writes the data of a step once. Computes in at least float32 and rounds once."""

    joins = True

    def rms_norm(self, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        return _RMSNorm.apply(x, gain, eps)

    def heads(
        self, qkv_BTX: Tensor, step: HeadStep, rotation: Tensor | None, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if step.head_dim & (step.head_dim - 1):
            return super().heads(qkv_BTX, step, rotation, temperature)
        return _Heads.apply(qkv_BTX, step, rotation, temperature)

    def spread(self, x_TD: Tensor, slots: SortedSlots, weights_TK: Tensor | None, y_CD: Tensor | None) -> MovedRows:
        y_CD = None if weights_TK is None else y_CD
        given = [_dense(t) for t in (weights_TK, slots.is_padding_C1, y_CD)]
        rows_CD, found_TK = OPS.spread(_dense(x_TD), slots.source_C, slots.place_TK, *given)
        if y_CD is not None and slots.is_partial:  # the kernel has one program per row
            found_TK.masked_fill_(slots.place_TK < 0, 0)
        return rows_CD, None if y_CD is None else found_TK

    def collect(self, y_CD: Tensor, slots: SortedSlots, weights_TK: Tensor | None, x_TD: Tensor | None) -> MovedRows:
        x_TD = None if weights_TK is None else x_TD
        given = [_dense(t) for t in (slots.place_TK, weights_TK, x_TD)]
        tokens_TD, found_TK = OPS.collect(_dense(y_CD), *given)
        return tokens_TD, None if x_TD is None else found_TK

    def swiglu_forward(self, gate_CF: Tensor, up_CF: Tensor) -> tuple[Tensor, Tensor | None]:
        return OPS.swiglu(gate_CF, up_CF), None

    def swiglu_backward(self, grad_CF: Tensor, saved: Sequence[Tensor | None], into: Sequence[Tensor]) -> None:
        OPS.swiglu_backward(grad_CF, *(x for x in saved if x is not None), *into)


class _RMSNorm(torch.autograd.Function):
    """PyTorch's fused kernels, as operators that meta tensors have too. Saves the input as it is, and 1 / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
        y, inverse = OPS.rms_norm(x, gain, eps)
        ctx.save_for_backward(x, inverse, gain)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, inverse, gain = ctx.saved_tensors
        to_x, to_gain = OPS.rms_norm_backward(grads[0].contiguous(), x, inverse, gain)
        return to_x, None if gain is None else to_gain, None


class _Heads(torch.autograd.Function):
    """Saves the results for the norm, whose gradient follows from them, and nothing else but tables."""

    @staticmethod
    def forward(
        ctx: Any, qkv_BTX: Tensor, step: HeadStep, rotation: Tensor | None, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = qkv_BTX.shape[:2]
        tables = _table(rotation, batch, step.head_dim), _table(temperature, batch, 1)
        out_TNK, scale_TN = OPS.heads(_dense(qkv_BTX.flatten(0, 1)), *tables, *_numbers(step))
        ctx.step, ctx.batch = step, batch
        normalised = step.norm_eps is not None
        ctx.save_for_backward(*tables, out_TNK if normalised else None, scale_TN if normalised else None)
        q, k, v = out_TNK.unflatten(0, batch).split(step.heads, 2)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        *tables, out_TNK, scale_TN = ctx.saved_tensors
        given = [_dense(grad.flatten(0, 1)) for grad in grads]
        grad_TX = OPS.heads_backward(*given, *tables, out_TNK, scale_TN, *_numbers(ctx.step))
        return grad_TX.unflatten(0, ctx.batch), None, None, None


def _table(table: Tensor | None, batch: torch.Size, width: int) -> Tensor | None:
    """Return a table of positions, [B or 1, T, ...], as [T, width] for all sequences."""
    if table is None:
        return None
    flat = table.flatten(2)
    return flat.expand(*batch, width).reshape(-1, width)


def _numbers(step: HeadStep) -> tuple[int, int, int, bool, float, float]:
    eps = -1.0 if step.norm_eps is None else step.norm_eps
    halves = step.pairing is RopePairing.halves
    return step.num_heads, step.num_kv_heads, step.head_dim, halves, eps, step.query_scale


def _rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    narrow = None if gain is None else gain.to(x.dtype)
    y, inverse = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], narrow, eps)
    return y, inverse


def _rms_norm_results(x: Tensor, gain: Any, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=at_least_float32(x.dtype))


def _rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    narrow, wanted = (None, [True, False]) if gain is None else (gain.to(x.dtype), [True, True])
    to_x, to_gain = torch.ops.aten._fused_rms_norm_backward(grad, x, x.shape[-1:], inverse, narrow, wanted)
    return to_x, x.new_empty(0) if gain is None else to_gain.to(gain.dtype)


def _plain_rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the same on CPUs, where PyTorch has no fused kernel."""
    y, wide = widened(x) * inverse, widened(grad)
    scaled = wide if gain is None else wide * gain.to(x.dtype)  # the forward pass rounds it too
    to_x = inverse * (scaled - y * (scaled * y).mean(-1, keepdim=True))
    return to_x.to(x.dtype), x.new_empty(0) if gain is None else (wide * y).flatten(0, -2).sum(0).to(gain.dtype)


def _rms_norm_gradients(grad: Tensor, x: Tensor, inverse: Any, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if gain is None else torch.empty_like(gain)


def _spread(
    x: Tensor, source: Tensor, place: Tensor, weights: Tensor | None, is_padding: Tensor | None, y: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, found = _spread_results(x, source, place, weights, is_padding, y)
    if rows.numel():
        padding = None if is_padding is None else is_padding.view(torch.uint8)
        sizes = {"K": place.shape[1], **launch_sizes(x)}
        given = x, y, weights, source, padding, rows, found if y is not None else None
        _permute_kernels()[0][(len(rows),)](*given, WIDTH=x.shape[1], **sizes)
    return rows, found


def _spread_results(x: Tensor, source: Tensor, place: Tensor, weights: Any, is_padding: Any, y: Any) -> Any:
    return x.new_empty(len(source), x.shape[1]), _products(x, place, weights, y)


def _products(like: Tensor, place: Tensor, weights: Tensor | None, other: Tensor | None) -> Tensor:
    """Return the tensor for dot products [T, K]; an empty one if they are not wanted."""
    return like.new_empty(0) if weights is None or other is None else torch.empty_like(weights)


def _collect(y: Tensor, place: Tensor, weights: Tensor | None, x: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens, found = _collect_results(y, place, weights, x)
    if tokens.numel():
        top_k = place.shape[1]
        sizes = {"K": top_k, "SLOTS": power_of_two(top_k), **launch_sizes(y)}
        given = y, x, weights, place, tokens, found if x is not None else None
        _permute_kernels()[1][(len(tokens),)](*given, WIDTH=y.shape[1], **sizes)
    return tokens, found


def _collect_results(y: Tensor, place: Tensor, weights: Any, x: Any) -> Any:
    return y.new_empty(len(place), y.shape[1]), _products(y, place, weights, x)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = _swiglu_result(gate, up)
    _launch_by_element(_swiglu_kernels()[0], gate, up, out)
    return out


def _swiglu_result(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, to_gate: Tensor, to_up: Tensor) -> None:
    _launch_by_element(_swiglu_kernels()[1], grad, gate, up, to_gate, to_up)


def _heads(
    qkv: Tensor, rotation: Tensor | None, scale: Tensor | None, h: int, g: int, width: int, halves: bool, eps: float,
    c: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, inverse = _heads_results(qkv, rotation, scale, h, g, width, halves, eps, c)
    if len(qkv):
        given = qkv, rotation, scale, out, inverse if eps >= 0 else None
        _heads_kernel()[(len(qkv),)](*given, eps, c, **_head_sizes(qkv, h, g, width, halves))
    return out, inverse


def _heads_results(
    qkv: Tensor, rotation: Any, scale: Any, h: int, g: int, width: int, halves: bool, eps: float, c: float
) -> tuple[Tensor, Tensor]:
    inverse = qkv.new_empty((len(qkv), h + g) if eps >= 0 else (0,), dtype=at_least_float32(qkv.dtype))
    return qkv.new_empty(len(qkv), h + 2 * g, width), inverse


def _heads_backward(
    q: Tensor, k: Tensor, v: Tensor, rotation: Tensor | None, scale: Tensor | None, out: Tensor | None,
    inverse: Tensor | None, h: int, g: int, width: int, halves: bool, eps: float, c: float,
) -> Tensor:  # fmt: skip
    grad = _heads_gradient(q, k, v, rotation, scale, out, inverse, h, g, width, halves, eps, c)
    if len(grad):
        given = q, k, v, rotation, scale, out, inverse, grad, c
        _heads_backward_kernel()[(len(grad),)](*given, **_head_sizes(q, h, g, width, halves))
    return grad


def _heads_gradient(
    q: Tensor, k: Tensor, v: Tensor, rotation: Any, scale: Any, out: Any, inverse: Any, h: int, g: int, width: int,
    halves: bool, eps: float, c: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(len(q), (h + 2 * g) * width)


def _head_sizes(like: Tensor, h: int, g: int, k: int, halves: bool) -> dict[str, Any]:
    sizes = launch_sizes(like)
    return {"H": h, "G": g, "K": k, "HALVES": halves, "BLOCK": max(2048 // k, 1), "WIDE": sizes["WIDE"], "num_warps": 4}


_LIBRARY = torch.library.Library("leviathan", "DEF")


def define_operator(schema: str, compute: Callable[..., Any], results: Callable[..., Any]) -> None:
    """Define an operator. `results` allocates its results, and runs on meta tensors in place of `compute`."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, results, "Meta")


_TWO_TENSORS = "-> (Tensor, Tensor)"
_HEAD_STEP = "int h, int g, int width, bool halves, float eps, float c"
define_operator(f"rms_norm(Tensor x, Tensor? gain, float eps) {_TWO_TENSORS}", _rms_norm, _rms_norm_results)
define_operator(
    f"rms_norm_backward(Tensor grad, Tensor x, Tensor inverse, Tensor? gain) {_TWO_TENSORS}",
    _rms_norm_backward,
    _rms_norm_gradients,
)
_LIBRARY.impl("rms_norm_backward", _plain_rms_norm_backward, "CPU")
define_operator(
    f"spread(Tensor x, Tensor source, Tensor place, Tensor? weights, Tensor? is_padding, Tensor? y) {_TWO_TENSORS}",
    _spread,
    _spread_results,
)
define_operator(
    f"collect(Tensor y, Tensor place, Tensor? weights, Tensor? x) {_TWO_TENSORS}", _collect, _collect_results
)
define_operator("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu, _swiglu_result)
define_operator(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up, Tensor(a!) to_gate, Tensor(b!) to_up) -> ()",
    _swiglu_backward,
    lambda *tensors: None,
)
define_operator(
    f"heads(Tensor qkv, Tensor? rotation, Tensor? scale, {_HEAD_STEP}) {_TWO_TENSORS}", _heads, _heads_results
)
define_operator(
    "heads_backward(Tensor q, Tensor k, Tensor v, Tensor? rotation, Tensor? scale, Tensor? out, Tensor? inverse, "
    f"{_HEAD_STEP}) -> Tensor",
    _heads_backward,
    _heads_gradient,
)
OPS = torch.ops.leviathan


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def power_of_two(size: int) -> int:
    """Return the smallest power of two >= `size`. Triton's blocks must have such sizes."""
    return 1 << (size - 1).bit_length()


def launch_sizes(x: Tensor) -> dict[str, Any]:
    """Return a kernel's block size, accumulation type and warps. Each thread gets 8 elements (16 bytes of bf16)."""
    import triton.language as tl

    block = min(power_of_two(x.shape[-1]), 1024)
    wide = tl.float64 if at_least_float32(x.dtype) is torch.float64 else tl.float32
    return {"BLOCK": block, "WIDE": wide, "num_warps": max(block // 256, 1)}


def _launch_by_element(kernel: Any, *tensors: Tensor) -> None:
    """Launch over tensors [C, F] of equal shape; rows may be strided."""
    assert all(x.stride(-1) == 1 for x in tensors), "rows must be dense"
    rows, width = tensors[0].shape
    sizes = launch_sizes(tensors[0])
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
                part = tl.load(y + row * WIDTH + columns, mask=here & (row >= 0), other=0).to(WIDE)
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


@cache
def _heads_kernel() -> Any:
    """Build the kernel of the forward pass. A program processes all heads of a token."""
    import triton
    import triton.language as tl

    @triton.jit
    def heads(  # type: ignore[no-untyped-def]
        qkv, rotation, scale, out, inverse, EPS: tl.constexpr, CONSTANT: tl.constexpr,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
        WIDE: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, K)
        factor = tl.full([1, 1], CONSTANT, WIDE)
        if scale is not None:
            factor *= tl.load(scale + token).to(WIDE)
        if rotation is not None:
            cos, sin = tl.split(tl.reshape(tl.load(rotation + token * K + columns).to(WIDE), [1, K // 2, 2]))
        for start in range(0, H + 2 * G, BLOCK):
            head = start + tl.arange(0, BLOCK)[:, None]
            here, turned = head < H + 2 * G, head < H + G
            places = (token * (H + 2 * G) + head) * K + columns[None]
            x = tl.load(qkv + places, mask=here, other=0).to(WIDE)
            if rotation is not None:
                if HALVES:
                    first, second = tl.split(tl.permute(tl.reshape(x, [BLOCK, 2, K // 2]), [0, 2, 1]))
                else:
                    first, second = tl.split(tl.reshape(x, [BLOCK, K // 2, 2]))
                pairs = tl.join(first * cos - second * sin, first * sin + second * cos)
                if HALVES:
                    pairs = tl.permute(pairs, [0, 2, 1])
                x = tl.where(turned, tl.reshape(pairs, [BLOCK, K]), x)
            if inverse is not None:
                root = tl.rsqrt(tl.sum(x * x, 1)[:, None] / K + EPS)
                tl.store(inverse + token * (H + G) + head, root, mask=turned)
                x = tl.where(turned, x * root, x)
            x = tl.where(head < H, x * factor, x)
            tl.store(out + places, x, mask=here)

    return heads


@cache
def _heads_backward_kernel() -> Any:
    """Build the kernel of the backward pass."""
    import triton
    import triton.language as tl

    @triton.jit
    def heads_backward(  # type: ignore[no-untyped-def]
        to_q, to_k, to_v, rotation, scale, out, inverse, grad, CONSTANT: tl.constexpr,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
        WIDE: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, K)
        factor = tl.full([1, 1], CONSTANT, WIDE)
        if scale is not None:
            factor *= tl.load(scale + token).to(WIDE)
        if rotation is not None:
            cos, sin = tl.split(tl.reshape(tl.load(rotation + token * K + columns).to(WIDE), [1, K // 2, 2]))
        for part in tl.static_range(3):
            count = H if part == 0 else G
            before = 0 if part == 0 else (H if part == 1 else H + G)
            for start in range(0, count, BLOCK):
                row = start + tl.arange(0, BLOCK)[:, None]
                here = row < count
                given = (token * count + row) * K + columns[None]
                places = (token * (H + 2 * G) + before + row) * K + columns[None]
                if part == 0:
                    d = tl.load(to_q + given, mask=here, other=0).to(WIDE) * factor
                elif part == 1:
                    d = tl.load(to_k + given, mask=here, other=0).to(WIDE)
                else:
                    d = tl.load(to_v + given, mask=here, other=0).to(WIDE)
                if part < 2:
                    if inverse is not None:
                        y = tl.load(out + places, mask=here, other=0).to(WIDE)
                        if part == 0:
                            y /= factor
                        root = tl.load(inverse + token * (H + G) + before + row, mask=here, other=0)
                        d = root * (d - y * (tl.sum(d * y, 1)[:, None] / K))
                    if rotation is not None:
                        if HALVES:
                            first, second = tl.split(tl.permute(tl.reshape(d, [BLOCK, 2, K // 2]), [0, 2, 1]))
                        else:
                            first, second = tl.split(tl.reshape(d, [BLOCK, K // 2, 2]))
                        pairs = tl.join(first * cos + second * sin, second * cos - first * sin)
                        if HALVES:
                            pairs = tl.permute(pairs, [0, 2, 1])
                        d = tl.reshape(pairs, [BLOCK, K])
                tl.store(grad + places, d, mask=here)

    return heads_backward
