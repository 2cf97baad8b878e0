"""Compare the head and its loss by blocks with PyTorch's chunked loss and with the loss of whole logits: results, time
and peak memory.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu.clock import distance
from bench.gpu.context import PLAIN, Bench, BenchJob
from bench.gpu.record import BenchRow
from model.head import Head, token_losses
from model.roles import Role
from precision.resolve import resolve

GATE = 1e-2
MOST_BYTES = 1.5e9
"""Largest peak of the loss by blocks for 8,192 tokens and 202,048 words, without the weight and its gradient."""
WHOLE, CHUNKED = "whole logits", "F.linear_cross_entropy"


def head(bench: Bench) -> Iterator[BenchJob]:
    sizes = (
        {"tiny": (64, 32, 512)} if bench.dry else {"Llama 4": (8192, 5120, 202048), "Qwen3 30B": (8192, 2048, 151936)}
    )
    for name, (tokens, width, words) in sizes.items():
        yield BenchJob(name, partial(_measure, bench, name, tokens, width, words))


class _HeadCase:
    def __init__(self, bench: Bench, tokens: int, width: int, words: int) -> None:
        with torch.device("meta"):
            module = Head(width, words, Role.head, resolve(bench.precisions[PLAIN], bench.device).plain)
        self.head = module.to(torch.bfloat16).to_empty(device=bench.device)
        with torch.no_grad():
            self.head.weight.copy_(bench.random(words, width, seed=1, scale=width**-0.5))
        self.x = bench.random(1, tokens, width).requires_grad_()
        generator = torch.Generator().manual_seed(2)
        self.labels = torch.randint(words, (1, tokens), generator=generator).to(bench.device)

    def blocks(self) -> Tensor:
        return self.head(self.x, self.labels)

    def whole(self) -> Tensor:
        return token_losses(self.head(self.x).flatten(0, 1), self.labels.flatten())[None]

    def chunked(self) -> Tensor:
        """Return losses in bfloat16: PyTorch's chunked loss rounds them to the dtype of its input."""
        options, given = nn.LinearCrossEntropyOptions(), (self.x[0], self.head.weight, self.labels[0])
        found: Tensor = F.linear_cross_entropy(*given, reduction="none", options=options)
        return found[None]

    def results(self, side: Callable[[], Tensor]) -> list[Tensor]:
        losses = side()
        return [losses.detach(), *torch.autograd.grad(losses.float().mean(), [self.x, self.head.weight])]

    def step(self, side: Callable[[], Tensor]) -> None:
        side().float().mean().backward()
        self.x.grad = self.head.weight.grad = None


def _measure(bench: Bench, name: str, tokens: int, width: int, words: int) -> Iterator[BenchRow]:
    case = _HeadCase(bench, tokens, width, words)
    sides = {PLAIN: case.blocks, WHOLE: case.whole}
    shape: dict[str, int | str] = {"D": width, "V": words}
    error = max(map(distance, case.results(case.blocks), case.results(case.whole)))
    bench.clear()
    failed = None if error < GATE else f"wrong: {error:.1e} from the loss of whole logits, allowed {GATE:.0e}"
    yield BenchRow("head", name, PLAIN, "check", shape, tokens, error=error, gate=GATE, failed=failed)
    if hasattr(nn, "LinearCrossEntropyOptions"):
        sides[CHUNKED] = case.chunked
        error = max(map(distance, case.results(case.chunked), case.results(case.whole)))
        bench.clear()
        yield BenchRow("head", name, CHUNKED, "check", shape, tokens, error=error)
    else:
        missing = f"torch {torch.__version__} does not have its options"
        yield BenchRow("head", name, CHUNKED, "check", shape, tokens, missing=missing)
    peaks = {side: peak_bytes(bench, partial(case.step, work), case.head.weight) for side, work in sides.items()}
    timings = dict(zip(sides, bench.clock.turns([partial(case.step, work) for work in sides.values()]), strict=True))
    for side, timing in timings.items():
        peak, failed = peaks[side], None
        if side == PLAIN and peak is not None and peak > MOST_BYTES:
            failed = f"its peak is {peak / 1e9:.2f} GB, allowed {MOST_BYTES / 1e9:g}"
        yield BenchRow(
            "head", f"{name}, head and loss", side, "forward+backward", shape, tokens, ms=timing.ms,
            spread=timing.spread, flops=6.0 * tokens * width * words, memory_bytes=peak, failed=failed,
            note="peak without the weight and its gradient",
        )  # fmt: skip
    for side in [side for side in timings if side != PLAIN]:
        ratio, what = timings[PLAIN].over(timings[side]), f"{name}, time ratio"
        yield BenchRow("head", what, PLAIN, "forward+backward", shape, tokens, ratio=ratio, against=side)


def peak_bytes(bench: Bench, work: Callable[[], None], weight: Tensor) -> int | None:
    """Return the peak memory of `work` without what was there before and without the gradient of `weight`."""
    if bench.peak_bytes is None:
        work()
        return None
    bench.clear()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - weight.nbytes
