"""Attention in pieces: memory linear in the row, whatever documents it has, and keys that come one part at a time.

A range of queries of one document sees all keys of that document before it, a rectangle, and itself causally, a square.
So no mask is ever needed: each piece is a plain attention that also returns the log-sum-exp of its scores, and partial
results over different keys are merged by it (Dao et al. 2022, arXiv 2205.14135, section 3.1). With the result and the
log-sum-exp over all keys the backward pass of each piece by itself gives exact parts of the gradients.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from precision.gemm import at_least_float32, widened

_AT_ONCE = 1024
"""Queries at a time where there is no kernel and scores are made explicitly."""


class SegmentRun(NamedTuple):
    """Positions [start, stop) of a row, which lie one after the other in a tensor, the first one at `at`."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Segment:
    """Some rows' queries against keys, both as places in their tensors; `causal`: they are the same positions, and each
    query sees the keys up to its own. Otherwise it sees them all.
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool


Documents = list[tuple[int, ...]]
"""Of each row: where its documents begin, and last where it ends."""


def documents(starts_BT: Tensor) -> Documents:
    """Each row's documents, out of where they start (bool, on the host). A row's first position starts one."""
    length = starts_BT.shape[1]
    return [(0, *(row[1:].nonzero()[:, 0] + 1).tolist(), length) for row in starts_BT]


def pieces(rows: Documents, queries: Sequence[SegmentRun], keys: Sequence[SegmentRun]) -> list[Segment]:
    """What is to be computed so that each query sees the keys of its document up to itself, as far as they are in
    `keys`. A run of keys must hold all of a run of queries or end before it or begin after it. Squares come first.
    """
    found: list[Segment] = []
    first = 0
    for borders, same in groupby(rows):
        last = first + sum(1 for _ in same)
        for run in queries:
            found += _of_run(slice(first, last), borders, run, keys)
        first = last
    return sorted(found, key=lambda piece: not piece.causal)


def _of_run(rows: slice, borders: tuple[int, ...], run: SegmentRun, keys: Sequence[SegmentRun]) -> Iterator[Segment]:
    document = bisect_right(borders, run.start) - 1
    while document < len(borders) - 1 and borders[document] < run.stop:
        begin, end = borders[document], borders[document + 1]
        start, stop = max(begin, run.start), min(end, run.stop)
        asking = slice(start - run.start + run.at, stop - run.start + run.at)
        for part in keys:
            low, high = max(begin, part.start), min(part.stop, stop)
            before, offset = min(high, start), part.at - part.start
            if low < before:
                yield Segment(rows, asking, slice(low + offset, before + offset), causal=False)
            if max(low, start) < high:
                assert low <= start and high == stop, f"keys {part} hold a part of the queries {run}"
                yield Segment(rows, asking, slice(start + offset, stop + offset), causal=True)
        document += 1


@torch.compiler.disable
def attend_pieces(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, parts: Sequence[Segment]) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over what `parts` let each query see; every query must be in one square. Kept for the
    backward pass: the three inputs, the result, and one number per query and head.
    """
    return _AttendSegment.apply(q_BTHK, k_BSGK, v_BSGK, parts)


class Partial:
    """The result over the keys seen so far."""

    def __init__(self, q_BTHK: Tensor) -> None:
        self.q_BTHK = q_BTHK
        batch, length, heads, _ = q_BTHK.shape
        wide = at_least_float32(q_BTHK.dtype)
        self.out_BTHK = q_BTHK.new_zeros(q_BTHK.shape, dtype=wide)
        self.lse_BHT = q_BTHK.new_full((batch, heads, length), -torch.inf, dtype=wide)

    def see(self, k_BSGK: Tensor, v_BSGK: Tensor, parts: Iterable[Segment]) -> None:
        """Take in what `parts` show of these keys."""
        for part in parts:
            q, k, v = _cut(self.q_BTHK, k_BSGK, v_BSGK, part)
            out, lse = _forward(q, k, v, part.causal)
            mine = self.out_BTHK[part.rows, part.queries]
            mine_lse = self.lse_BHT[part.rows, :, part.queries]
            both = torch.logaddexp(mine_lse, lse)
            old, new = ((x - both).exp().transpose(1, 2)[..., None] for x in (mine_lse, lse))
            mine.copy_(mine * old + out.transpose(1, 2) * new)
            mine_lse.copy_(both)

    def result(self) -> Tensor:
        return self.out_BTHK.to(self.q_BTHK.dtype)


class Gradients:
    """The gradients so far: dk and dv are added to tensors that are given, for their keys may come from elsewhere."""

    def __init__(self, grad_BTHK: Tensor, q_BTHK: Tensor, out_BTHK: Tensor, lse_BHT: Tensor) -> None:
        self.grad_BTHK, self.q_BTHK, self.out_BTHK, self.lse_BHT = grad_BTHK, q_BTHK, out_BTHK, lse_BHT
        self.dq_BTHK = torch.zeros_like(q_BTHK, dtype=lse_BHT.dtype)

    def see(self, k_BSGK: Tensor, v_BSGK: Tensor, dk_BSGK: Tensor, dv_BSGK: Tensor, parts: Iterable[Segment]) -> None:
        """Add what `parts` contribute."""
        for part in parts:
            q, k, v = _cut(self.q_BTHK, k_BSGK, v_BSGK, part)
            grad, out = (x[part.rows, part.queries].transpose(1, 2) for x in (self.grad_BTHK, self.out_BTHK))
            dq, dk, dv = _backward(grad, q, k, v, out, self.lse_BHT[part.rows, :, part.queries], part.causal)
            self.dq_BTHK[part.rows, part.queries] += dq.transpose(1, 2)
            dk_BSGK[part.rows, part.keys] += dk.transpose(1, 2)
            dv_BSGK[part.rows, part.keys] += dv.transpose(1, 2)


class _AttendSegment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Segment]) -> Tensor:
        partial = Partial(q)
        partial.see(k, v, parts)
        out = partial.result()
        ctx.save_for_backward(q, k, v, out, partial.lse_BHT)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        found = Gradients(grads[0], q, out, lse)
        dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
        found.see(k, v, dk, dv, ctx.parts)
        return found.dq_BTHK.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _cut(q: Tensor, k: Tensor, v: Tensor, part: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """A piece's heads before positions: [B, H or G, L, K]."""
    return (
        q[part.rows, part.queries].transpose(1, 2),
        k[part.rows, part.keys].transpose(1, 2),
        v[part.rows, part.keys].transpose(1, 2),
    )


def _has_kernel(q: Tensor) -> bool:
    """Whether torch has a flash kernel on GPUs for this format and width that returns the log-sum-exp."""
    return (
        q.device.type == "cuda"
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
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
    if q.device.type == "cpu":
        kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, 0.0, causal)
    if _has_kernel(q):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
        groups, lengths = k.shape[1], (q.shape[2], k.shape[2])
        k, v = _each_head(k, q), _each_head(v, q)
        none = torch.empty(0, dtype=torch.int64)  # no dropout, so no random state
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = kernel(grad, q, k, v, out, lse.contiguous(), None, None, *lengths, 0.0, causal, state, none)
        return dq, *(x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return plain_backward(grad, q, k, v, out, lse, causal)


def _each_head(x_BGSK: Tensor, q_BHTK: Tensor) -> Tensor:
    """Keys or values repeated for each query head."""
    times = q_BHTK.shape[1] // x_BGSK.shape[1]
    return x_BGSK if times == 1 else x_BGSK.repeat_interleave(times, dim=1)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """By products and exponentials, some queries at a time: [B, H, T, K] and the log-sum-exp [B, H, T]."""
    outs, lses = [], []
    for start in range(0, q.shape[2], _AT_ONCE):
        p, lse, keys = _probabilities(q, k, start, causal, None)
        lses.append(lse)
        outs.append((p @ widened(_each_head(v[:, :, :keys], q))).to(q.dtype))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that belong to these keys, given the result and the log-sum-exp over all of them."""
    scale, groups = q.shape[-1] ** -0.5, k.shape[1]
    dq = torch.zeros_like(q, dtype=lse.dtype)
    dk, dv = (torch.zeros_like(_each_head(x, q), dtype=lse.dtype) for x in (k, v))
    for start in range(0, q.shape[2], _AT_ONCE):
        here = slice(start, start + _AT_ONCE)
        p, _, keys = _probabilities(q, k, start, causal, lse)
        wanted = widened(grad[:, :, here])
        delta = (wanted * widened(out[:, :, here])).sum(-1, keepdim=True)
        ds = p * (wanted @ widened(_each_head(v[:, :, :keys], q)).transpose(-1, -2) - delta) * scale
        dq[:, :, here] = ds @ widened(_each_head(k[:, :, :keys], q))
        dk[:, :, :keys] += ds.transpose(-1, -2) @ widened(q[:, :, here])
        dv[:, :, :keys] += p.transpose(-1, -2) @ wanted
    return dq, dk.unflatten(1, (groups, -1)).sum(2), dv.unflatten(1, (groups, -1)).sum(2)


def _probabilities(q: Tensor, k: Tensor, start: int, causal: bool, lse: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Of the queries from `start` on and the keys that the last of them sees, relative to `lse` or to their own."""
    here = slice(start, start + _AT_ONCE)
    keys = min(start + _AT_ONCE, k.shape[2]) if causal else k.shape[2]
    scores = widened(q[:, :, here]) @ widened(_each_head(k[:, :, :keys], q)).transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        places = torch.arange(keys, device=q.device)
        scores = scores.masked_fill(places > places[here, None], -torch.inf)
    lse = scores.logsumexp(-1) if lse is None else lse[:, :, here]
    return (scores - lse[..., None]).exp(), lse, keys
