"""Time our attention by length and kind: causal, chunked, and sequences of several documents as segments.

Shapes: B sequences, T positions, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.clock import distance
from bench.gpu.context import PLAIN, Bench, BenchJob
from bench.gpu.record import BenchRow
from model.attention.layer import attend
from model.attention.plan import AttentionPlan, ForwardContext

GATE = 1e-2


@dataclass(frozen=True)
class AttentionCase:
    """Sequences of `length` positions, in `documents` documents of equal length. `chunk`: attention chunk or None."""

    name: str
    length: int
    chunk: int | None = None
    documents: int = 1

    @property
    def reach(self) -> int:
        """The most keys to which a query attends. Under the causal mask it attends to half of them on average."""
        return min(self.length // self.documents, self.chunk or self.length)

    def positions(self, rows: int) -> Tensor:
        document = self.length // self.documents
        return torch.arange(document).repeat(self.documents).expand(rows, -1)


def kinds(dry: bool) -> list[AttentionCase]:
    if dry:
        return [
            AttentionCase("causal", 64),
            AttentionCase("chunks of 16", 64, 16),
            AttentionCase("4 documents as segments", 512, None, 4),
        ]
    whole = [AttentionCase("causal", length) for length in (1024, 2048, 4096, 8192, 16384, 32768)]
    chunked = [AttentionCase(f"chunks of {chunk}", 32768, chunk) for chunk in (1024, 2048, 8192)]
    return [
        *whole,
        *chunked,
        AttentionCase("8 documents as segments", 8192, None, 8),
        AttentionCase("16 documents as segments", 32768, None, 16),
    ]


def attention(bench: Bench) -> Iterator[BenchJob]:
    heads = {"tiny": (4, 2, 16)} if bench.dry else {"Llama 4": (40, 8, 128), "Qwen3 30B": (32, 4, 128)}
    for kind in kinds(bench.dry):
        for name, (h, g, k) in heads.items():
            yield BenchJob(f"{name}, {kind.name}, {kind.length}", partial(_measure, bench, name, kind, h, g, k))


class _Case:
    def __init__(self, bench: Bench, kind: AttentionCase, rows: int, heads: tuple[int, int, int]) -> None:
        h, g, k = heads
        shapes = ((rows, kind.length, h, k), *[(rows, kind.length, g, k)] * 2)
        self.qkv = [bench.random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
        self.grad = bench.random(rows, kind.length, h, k, seed=3)
        self.plan: AttentionPlan = ForwardContext(kind.positions(rows), bench.device).plan(kind.chunk)

    def forward(self) -> None:
        with torch.no_grad():
            attend(self.qkv[0], self.qkv[1], self.qkv[2], self.plan)

    def both(self) -> None:
        attend(self.qkv[0], self.qkv[1], self.qkv[2], self.plan).backward(self.grad)
        for x in self.qkv:
            x.grad = None

    def error(self, kind: AttentionCase) -> float:
        """Return the largest error of the output and gradients against float32 attention with a full [T, T] mask."""
        y = attend(self.qkv[0], self.qkv[1], self.qkv[2], self.plan)
        found = [y.detach(), *torch.autograd.grad(y, self.qkv, self.grad)]
        wide = [x.detach().float().requires_grad_() for x in self.qkv]
        q, k, v = (x.transpose(1, 2) for x in wide)
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(kind).to(q.device), enable_gqa=True).transpose(
            1, 2
        )
        wanted = [exact.detach(), *torch.autograd.grad(exact, wide, self.grad.float())]
        return max(map(distance, found, wanted))


def _seen(kind: AttentionCase) -> Tensor:
    """Return the mask, bool [T, T]. A query attends to the keys of its document and chunk, up to its own position."""
    place, length = torch.arange(kind.length), kind.length // kind.documents
    part = place // length * kind.length + place % length // (kind.chunk or kind.length)
    return (part[:, None] == part) & (place <= place[:, None])


def _measure(bench: Bench, name: str, kind: AttentionCase, h: int, g: int, k: int) -> Iterator[BenchRow]:
    rows = 1 if bench.dry else max(32768 // kind.length, 1)
    shape: dict[str, int | str] = {"B": rows, "T": kind.length, "H": h, "G": g, "K": k, "documents": kind.documents}
    if kind.chunk:
        shape["chunk"] = kind.chunk
    tokens = rows * kind.length
    error = None
    if kind.length <= 8192:  # longer [T, T] masks and float32 scores do not fit in memory
        error = _Case(bench, kind, 1, (h // g, 1, k)).error(kind)
        if not error < GATE:
            failed = f"wrong: {error:.1e} from float32, allowed {GATE:.0e}"
            yield BenchRow(
                "attention",
                f"{name}, {kind.name}",
                PLAIN,
                "check",
                shape,
                tokens,
                error=error,
                gate=GATE,
                failed=failed,
            )
            return
    case = _Case(bench, kind, rows, (h, g, k))
    flops = 2.0 * tokens * kind.reach * h * k
    moved = 2 * tokens * k * (2 * h + 2 * g)
    for phase, side, times in (("forward", case.forward, 1), ("forward+backward", case.both, 3)):
        timing = bench.clock.time(side)
        yield BenchRow(
            "attention", f"{name}, {kind.name}", PLAIN, phase, shape, tokens, ms=timing.ms, spread=timing.spread,
            flops=flops * times, bytes=moved * times, error=error, gate=GATE,
        )  # fmt: skip
