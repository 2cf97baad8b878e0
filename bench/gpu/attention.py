"""Time attention by length and kind: causal, chunked and packed documents, by every kernel that can compute it.

Shapes: B sequences, T positions, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.gpu.clock import distance
from bench.gpu.context import PLAIN, Bench, BenchJob
from bench.gpu.documents import count, packed_positions
from bench.gpu.record import BenchRow
from model.attention.layer import local_attention, varlen_attention
from model.attention.plan import ForwardContext, squared_lengths
from precision.resolve import no_varlen

GATE = 1e-2
VARLEN, SEGMENTS, FLEX, MASKED = "varlen", "segments", "FlexAttention", "SDPA with a mask"
MOST_MASKED = 8192
"""Longest sequences for which a mask [T, T] and float32 scores fit in memory."""
Attending = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionCase:
    """Sequences of `length` positions. `chunk`: attention chunk or None. `packed`: documents of log-normal lengths."""

    name: str
    length: int
    chunk: int | None = None
    packed: bool = False

    def positions(self, rows: int) -> Tensor:
        return packed_positions(rows, self.length) if self.packed else torch.arange(self.length).expand(rows, -1)


def kinds(dry: bool) -> list[AttentionCase]:
    if dry:
        return [
            AttentionCase("causal", 64),
            AttentionCase("chunks of 16", 64, 16),
            AttentionCase("packed", 512, None, True),
            AttentionCase("packed, chunks of 128", 512, 128, True),
        ]
    return [
        AttentionCase("packed", 8192, None, True),
        AttentionCase("packed, chunks of 1024", 8192, 1024, True),
        *(AttentionCase("causal", length) for length in (2048, 8192, 32768)),
        AttentionCase("chunks of 8192", 32768, 8192),
        AttentionCase("packed", 32768, None, True),
        AttentionCase("packed, chunks of 8192", 32768, 8192, True),
    ]


def attention(bench: Bench) -> Iterator[BenchJob]:
    heads = {"tiny": (4, 2, 16)} if bench.dry else {"Llama 4": (40, 8, 128), "Qwen3 30B": (32, 4, 128)}
    reason = no_varlen(bench.precisions[PLAIN], bench.device)
    if reason:
        yield BenchJob(VARLEN, lambda: [BenchRow("attention", "all", VARLEN, missing=reason)])
    for kind in kinds(bench.dry):
        for name, (h, g, k) in heads.items():
            yield BenchJob(f"{name}, {kind.name}, {kind.length}", partial(_measure, bench, name, kind, h, g, k))


class _Case:
    def __init__(self, bench: Bench, kind: AttentionCase, rows: int, heads: tuple[int, int, int]) -> None:
        h, g, k = heads
        shapes = ((rows, kind.length, h, k), *[(rows, kind.length, g, k)] * 2)
        self.bench, self.kind = bench, kind
        self.qkv = [bench.random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
        self.grad = bench.random(rows, kind.length, h, k, seed=3)
        self.positions_BT = kind.positions(rows)
        self.context = ForwardContext(self.positions_BT, bench.device)

    def sides(self) -> dict[str, Attending]:
        """Return every way to compute this case, ours first. Masks and plans are made once a batch, and not timed."""
        kind, bench = self.kind, self.bench
        found: dict[str, Attending] = {}
        if no_varlen(bench.precisions[PLAIN], bench.device) is None:
            found[VARLEN] = lambda q, k, v: varlen_attention(q, k, v, self.context, kind.chunk)
        found[SEGMENTS] = lambda q, k, v: local_attention(q, k, v, self.context, kind.chunk)
        if kind.packed and bench.device.type == "cuda" and importlib.util.find_spec("triton"):
            found[FLEX] = flex(self.parts(), _compiled())
        if kind.packed and kind.length <= MOST_MASKED:
            found[MASKED] = partial(_masked, _visible(self.parts(), torch.arange(kind.length, device=bench.device)))
        return found

    def parts(self) -> Tensor:
        """Return the number of the document or chunk of each position, [B, T] on the device."""
        chunk = self.kind.chunk or self.kind.length
        return (self.positions_BT % chunk == 0).cumsum(1).to(self.bench.device)

    def forward(self, side: Attending) -> None:
        with torch.no_grad():
            side(*self.qkv)

    def both(self, side: Attending) -> None:
        side(*self.qkv).backward(self.grad)
        for x in self.qkv:
            x.grad = None

    def wanted(self) -> list[Tensor]:
        """Return the output and the gradients of float32 attention with a full [T, T] mask."""
        mask = _visible(self.parts(), torch.arange(self.kind.length, device=self.bench.device))
        wide = [x.detach().float().requires_grad_() for x in self.qkv]
        exact = _masked(mask, *wide)
        return [exact.detach(), *torch.autograd.grad(exact, wide, self.grad.float())]

    def found(self, side: Attending) -> list[Tensor]:
        y = side(*self.qkv)
        return [y.detach(), *torch.autograd.grad(y, self.qkv, self.grad)]


def _visible(parts_BT: Tensor, places_T: Tensor) -> Tensor:
    """Return the mask, bool [B, 1, T, T]. A query attends to keys of its document and chunk up to its own position."""
    same = parts_BT[:, :, None] == parts_BT[:, None, :]
    return (same & (places_T <= places_T[:, None]))[:, None]


def _masked(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with a mask. Keys are repeated, because the kernel that takes masks knows no groups."""
    repeats = q.shape[2] // k.shape[2]
    query, key, value = (
        x.transpose(1, 2) for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2))
    )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def flex(parts_BT: Tensor, compute: Any = flex_attention) -> Attending:
    """Return attention by FlexAttention. `compute`: its function, or the compiled one, which alone has a backward."""

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (parts_BT[b, query] == parts_BT[b, key]) & (key <= query)

    rows, length = parts_BT.shape
    blocks = create_block_mask(visible, rows, None, length, length, device=str(parts_BT.device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = compute(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks, enable_gqa=True)
        return y.transpose(1, 2)

    return attend


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def _measure(bench: Bench, name: str, kind: AttentionCase, h: int, g: int, k: int) -> Iterator[BenchRow]:
    rows = 1 if bench.dry else max(32768 // kind.length, 1)
    case = _Case(bench, kind, rows, (h, g, k))
    shape: dict[str, int | str] = {"B": rows, "T": kind.length, "H": h, "G": g, "K": k}
    shape |= {"documents": count(case.positions_BT)} | ({"chunk": kind.chunk} if kind.chunk else {})
    tokens, what = rows * kind.length, f"{name}, {kind.name}, {kind.length}"
    flops = 2.0 * squared_lengths(case.positions_BT, kind.chunk) * h * k
    moved = 2 * tokens * k * (2 * h + 2 * g)
    errors, raised = _errors(bench, kind, (h // g, 1, k))
    wrong = {side: f"wrong: {e:.1e} from float32, allowed {GATE:.0e}" for side, e in errors.items() if not e < GATE}
    for side, said in wrong.items():
        yield BenchRow("attention", what, side, "check", shape, tokens, error=errors[side], gate=GATE, failed=said)
    for side, said in raised.items():
        yield BenchRow("attention", what, side, "check", shape, tokens, missing=said)
    sides = {side: attend for side, attend in case.sides().items() if side not in wrong | raised}
    for phase, work, times in (("forward", case.forward, 1), ("forward+backward", case.both, 3)):
        timings = dict(zip(sides, bench.clock.turns([partial(work, one) for one in sides.values()]), strict=True))
        ours = next(iter(timings), None)
        for side, timing in timings.items():
            ratio, against = (timing.over(timings[ours]), ours) if ours and side != ours else (None, None)
            yield BenchRow(
                "attention", what, side, phase, shape, tokens, ms=timing.ms, spread=timing.spread, flops=flops * times,
                bytes=moved * times, error=errors.get(side), gate=GATE, ratio=ratio, against=against,
            )  # fmt: skip


def _errors(bench: Bench, kind: AttentionCase, heads: tuple[int, int, int]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the largest error of each side for one sequence and one group of heads, and what sides of PyTorch raised.
    Longer sequences than `MOST_MASKED` are not checked: their masks do not fit in memory.
    """
    errors, raised = dict[str, float](), dict[str, str]()
    if kind.length > MOST_MASKED:
        return errors, raised
    case = _Case(bench, kind, 1, heads)
    wanted = case.wanted()
    for side, attend in case.sides().items():
        try:
            errors[side] = max(map(distance, case.found(attend), wanted))
        except Exception as error:
            if side in (VARLEN, SEGMENTS):
                raise
            raised[side] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    bench.clear()
    return errors, raised
