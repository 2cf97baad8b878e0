"""Attention by segments: no mask, memory linear in the sequence length, and keys may arrive in parts.

A range of queries in one document attends to all earlier keys of the document (a rectangle) and to itself causally (a
square). Each is a segment: a plain attention that also returns the log-sum-exp of its scores, by which results over
different keys are merged (Dao et al. 2022, arXiv 2205.14135, section 3.1). Given the final result and log-sum-exp, the
backward pass of each segment yields its exact contribution to the gradients.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from precision.gemm import at_least_float32, widened

_QUERY_BLOCK = 1024
"""Queries per block in `plain_forward` and `plain_backward`, which keep the scores of a block in memory."""


class SegmentRun(NamedTuple):
    """Positions [start, stop) of a sequence, stored contiguously in a tensor from index `at`."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Segment:
    """Queries and keys of some sequences (`rows`), as slices of tensors. If `causal`, both have the same positions,
    and each query attends to the keys up to its own position. Otherwise each query attends to all of the keys.
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool


DocumentBounds = list[tuple[int, ...]]
"""For each sequence: the start of each document, then the sequence length."""


def document_bounds(starts_BT: Tensor) -> DocumentBounds:
    """Return the bounds from the document starts (bool, on the host). Position 0 always starts a document."""
    length = starts_BT.shape[1]
    return [(0, *(row[1:].nonzero()[:, 0] + 1).tolist(), length) for row in starts_BT]


def plan_segments(bounds: DocumentBounds, queries: Sequence[SegmentRun], keys: Sequence[SegmentRun]) -> list[Segment]:
    """Return segments in which each query attends to those of `keys` that are in its document and not after it.

    A run of keys must contain a run of queries entirely, end before it, or begin after it. Causal segments come first.
    """
    found: list[Segment] = []
    first = 0
    for borders, same in groupby(bounds):
        last = first + sum(1 for _ in same)
        for run in queries:
            found += _segments_of_run(slice(first, last), borders, run, keys)
        first = last
    return sorted(found, key=lambda segment: not segment.causal)


def _segments_of_run(
    rows: slice, borders: tuple[int, ...], run: SegmentRun, keys: Sequence[SegmentRun]
) -> Iterator[Segment]:
    for begin, end in pairwise(borders):
        start, stop = max(begin, run.start), min(end, run.stop)
        if start >= stop:
            continue
        query_slice = slice(start - run.start + run.at, stop - run.start + run.at)
        for part in keys:
            low, high = max(begin, part.start), min(part.stop, stop)
            before, offset = min(high, start), part.at - part.start
            if low < before:
                yield Segment(rows, query_slice, slice(low + offset, before + offset), causal=False)
            if max(low, start) < high:
                assert low <= start and high == stop, f"keys {part} contain only part of the queries {run}"
                yield Segment(rows, query_slice, slice(start + offset, stop + offset), causal=True)


@torch.compiler.disable
def attend_segments(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v over the pairs in `segments`. Every query must be in one causal segment. Saves
    the inputs, the result and the log-sum-exp for the backward pass.
    """
    return _SegmentAttention.apply(q_BTHK, k_BSGK, v_BSGK, segments)


class PartialAttention:
    """Attention over the keys that have been merged so far."""

    def __init__(self, q_BTHK: Tensor) -> None:
        self.q_BTHK = q_BTHK
        batch, length, heads, _ = q_BTHK.shape
        wide = at_least_float32(q_BTHK.dtype)
        self.out_BTHK = q_BTHK.new_zeros(q_BTHK.shape, dtype=wide)
        self.lse_BHT = q_BTHK.new_full((batch, heads, length), -torch.inf, dtype=wide)

    def update(self, k_BSGK: Tensor, v_BSGK: Tensor, segments: Iterable[Segment]) -> None:
        """Merge the attention of `segments` over these keys."""
        for segment in segments:
            q, k, v = _slices(self.q_BTHK, k_BSGK, v_BSGK, segment)
            out, lse = _forward(q, k, v, segment.causal)
            total = self.out_BTHK[segment.rows, segment.queries]
            total_lse = self.lse_BHT[segment.rows, :, segment.queries]
            both = torch.logaddexp(total_lse, lse)
            old, new = ((x - both).exp().transpose(1, 2)[..., None] for x in (total_lse, lse))
            total.copy_(total * old + out.transpose(1, 2) * new)
            total_lse.copy_(both)

    def result(self) -> Tensor:
        return self.out_BTHK.to(self.q_BTHK.dtype)


class AttentionGradients:
    """Gradients of attention, accumulated over keys. dk and dv are added to the caller's tensors, because the
    keys may be from another rank.
    """

    def __init__(self, grad_BTHK: Tensor, q_BTHK: Tensor, out_BTHK: Tensor, lse_BHT: Tensor) -> None:
        self.grad_BTHK, self.q_BTHK, self.out_BTHK, self.lse_BHT = grad_BTHK, q_BTHK, out_BTHK, lse_BHT
        self.dq_BTHK = torch.zeros_like(q_BTHK, dtype=lse_BHT.dtype)

    def update(
        self, k_BSGK: Tensor, v_BSGK: Tensor, dk_BSGK: Tensor, dv_BSGK: Tensor, segments: Iterable[Segment]
    ) -> None:
        """Add the gradients of `segments` over these keys."""
        for segment in segments:
            queries, keys = (segment.rows, segment.queries), (segment.rows, segment.keys)
            q, k, v = _slices(self.q_BTHK, k_BSGK, v_BSGK, segment)
            grad, out = (x[queries].transpose(1, 2) for x in (self.grad_BTHK, self.out_BTHK))
            lse = self.lse_BHT[segment.rows, :, segment.queries]
            dq, dk, dv = _backward(grad, q, k, v, out, lse, segment.causal)
            self.dq_BTHK[queries] += dq.transpose(1, 2)
            dk_BSGK[keys] += dk.transpose(1, 2)
            dv_BSGK[keys] += dv.transpose(1, 2)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment]) -> Tensor:
        partial = PartialAttention(q)
        partial.update(k, v, segments)
        out = partial.result()
        ctx.save_for_backward(q, k, v, out, partial.lse_BHT)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = AttentionGradients(grads[0], q, out, lse)
        dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
        gradients.update(k, v, dk, dv, ctx.segments)
        return gradients.dq_BTHK.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _slices(q: Tensor, k: Tensor, v: Tensor, segment: Segment) -> list[Tensor]:
    """Return the queries, keys and values of a segment, each [B, H or G, positions, K]."""
    places = ((q, segment.queries), (k, segment.keys), (v, segment.keys))
    return [x[segment.rows, positions].transpose(1, 2) for x, positions in places]


def device_kind(x: Tensor) -> str:
    """Return the type of the device whose kernels are used. A dry run replaces it: its tensors are on none."""
    return x.device.type


def _has_kernel(q: Tensor) -> bool:
    """Return whether torch has a flash kernel that returns the log-sum-exp for this device, dtype and head dim."""
    is_old = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0)
    has_flash = device_kind(q) == "cuda" and not is_old
    return has_flash and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    if device_kind(q) == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse
    if _has_kernel(q):
        k, v = _each_head(k, q), _each_head(v, q)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out, lse
    return plain_forward(q, k, v, causal)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if device_kind(q) == "cpu":
        kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, 0.0, causal)
    if _has_kernel(q):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
        groups, lengths = k.shape[1], (q.shape[2], k.shape[2])
        k, v = _each_head(k, q), _each_head(v, q)
        none = torch.empty(0, dtype=torch.int64)  # without dropout there is no random state
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = kernel(grad, q, k, v, out, lse.contiguous(), None, None, *lengths, 0.0, causal, state, none)
        return dq, *(x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return plain_backward(grad, q, k, v, out, lse, causal)


def _each_head(x_BGSK: Tensor, q_BHTK: Tensor) -> Tensor:
    """Repeat keys or values for each query head."""
    times = q_BHTK.shape[1] // x_BGSK.shape[1]
    return x_BGSK if times == 1 else x_BGSK.repeat_interleave(times, dim=1)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Compute attention without a flash kernel, by blocks of queries. Return [B, H, T, K] and log-sum-exp [B, H, T]."""
    outs, lses = [], []
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        p, lse, keys = _probabilities(q, k, start, causal, None)
        lses.append(lse)
        outs.append((p @ widened(_each_head(v[:, :, :keys], q))).to(q.dtype))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv over these keys, given the result and the log-sum-exp over all keys."""
    scale, groups = q.shape[-1] ** -0.5, k.shape[1]
    dq = torch.zeros_like(q, dtype=lse.dtype)
    dk, dv = (torch.zeros_like(_each_head(x, q), dtype=lse.dtype) for x in (k, v))
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        here = slice(start, start + _QUERY_BLOCK)
        p, _, keys = _probabilities(q, k, start, causal, lse)
        wanted = widened(grad[:, :, here])
        delta = (wanted * widened(out[:, :, here])).sum(-1, keepdim=True)
        ds = p * (wanted @ widened(_each_head(v[:, :, :keys], q)).transpose(-1, -2) - delta) * scale
        dq[:, :, here] = ds @ widened(_each_head(k[:, :, :keys], q))
        dk[:, :, :keys] += ds.transpose(-1, -2) @ widened(q[:, :, here])
        dv[:, :, :keys] += p.transpose(-1, -2) @ wanted
    return dq, dk.unflatten(1, (groups, -1)).sum(2), dv.unflatten(1, (groups, -1)).sum(2)


def _probabilities(q: Tensor, k: Tensor, start: int, causal: bool, lse: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Return the attention probabilities of the query block at `start`, their log-sum-exp and the number of keys.

    Without `lse`, the probabilities are normalised over these keys.
    """
    here = slice(start, start + _QUERY_BLOCK)
    keys = min(start + _QUERY_BLOCK, k.shape[2]) if causal else k.shape[2]
    scores = widened(q[:, :, here]) @ widened(_each_head(k[:, :, :keys], q)).transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        places = torch.arange(keys, device=q.device)
        scores = scores.masked_fill(places > places[here, None], -torch.inf)
    lse = scores.logsumexp(-1) if lse is None else lse[:, :, here]
    return (scores - lse[..., None]).exp(), lse, keys
