"""Check and time dense and grouped matmuls in every precision, and measure the device's limits.

Shapes: T tokens, D input width, F output width, E experts, C routed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.clock import distance
from bench.gpu.context import PLAIN, Bench, BenchJob
from bench.gpu.record import BenchRow
from bench.gpu.shapes import MoEShape, counts, matrices, moe_shapes
from precision.config import Backend, PrecisionConfig, Products
from precision.fp8_linear import Float8Gemm
from precision.gemm import GemmBackend, Groups
from precision.resolve import FLOAT8_LIBRARIES, resolve

GATES = {PLAIN: 1e-2}
FLOAT8_GATE = 8e-2
"""Largest error in FP8. E4M3 has 3 bits of mantissa: an error of 3.7% on normally distributed values. Gradients in E5M2
have 5.9%.
"""
SAME_BYTES_GATE = 2e-2
"""Largest difference of an FP8 matmul from the emulated one. Only the order and the precision of the sums differ."""


def gate(side: str) -> float:
    return GATES.get(side, FLOAT8_GATE)


def backend(bench: Bench, config: PrecisionConfig) -> GemmBackend:
    return resolve(config, bench.device).at(0, 1).of(Products.expert, "bench")


class ProductCase:
    """Inputs on the device, a GEMM backend and an upstream gradient. Without groups the matmul is dense."""

    def __init__(self, x: Tensor, w: Tensor, grad: Tensor, groups: Groups | None, gemm: GemmBackend) -> None:
        self.x, self.w = x.detach().requires_grad_(), w.detach().requires_grad_()
        self.grad, self.groups, self.gemm = grad, groups, gemm

    def forward(self) -> Tensor:
        return self.gemm.linear(self.x, self.w, self.groups)

    def forward_only(self) -> None:
        with torch.no_grad():
            self.forward()

    def both(self) -> None:
        self.forward().backward(self.grad)
        self.x.grad = self.w.grad = None

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output and the gradients of both operands."""
        y = self.forward()
        y.backward(self.grad)
        assert self.x.grad is not None and self.w.grad is not None
        found = y.detach(), self.x.grad, self.w.grad
        self.x.grad = self.w.grad = None
        return found

    def error(self) -> float:
        """Return the largest error of the output and the gradients against float32. Only some experts are compared,
        including the busiest and the last, because float32 copies of all experts do not fit in memory.
        """
        found = self.results()
        if self.groups is None:
            return max(map(distance, found, _exactly(self.x, self.w, self.grad)))
        squares = torch.zeros(3, 2, dtype=torch.float64)
        counts, ends = self.groups.host, self.groups.ends_E.tolist()
        for expert in {*range(0, len(counts), -(-len(counts) // 8)), len(counts) - 1, counts.index(max(counts))}:
            here = slice(ends[expert] - counts[expert], ends[expert])
            wanted = _exactly(self.x[here], self.w[expert], self.grad[here])
            for i, (one, exact) in enumerate(
                zip((found[0][here], found[1][here], found[2][expert]), wanted, strict=True)
            ):
                difference = (one.float() - exact).norm().square().nan_to_num(nan=torch.inf)
                squares[i] += torch.stack([difference, exact.norm().square()]).double().cpu()
        return float((squares[:, 0] / squares[:, 1].clamp_min(1e-30)).sqrt().max())


@torch.no_grad()
def _exactly(x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w, grad = x.float(), w.float(), grad.float()
    return x @ w.t(), grad @ w, grad.t() @ x


def ceilings(bench: Bench) -> Iterator[BenchJob]:
    """Measure the device's peak FLOP/s, memory bandwidth and launch time, with which to compare other rows."""
    size, length = (256, 1 << 20) if bench.dry else (8192, 1 << 30)

    def product() -> Iterator[BenchRow]:
        a, b = bench.random(size, size), bench.random(size, size, seed=1)
        timing = bench.clock.time(lambda: a @ b)
        shape: dict[str, int | str] = {"M": size, "N": size, "K": size}
        yield _row("ceilings", "square product", PLAIN, "forward", shape, size, timing, 2.0 * size**3)

    def copy() -> Iterator[BenchRow]:
        a = torch.randint(0, 100, (length,), device=bench.device, dtype=torch.int8)
        b = torch.empty_like(a)
        timing = bench.clock.time(lambda: b.copy_(a))
        yield BenchRow(
            "ceilings", "copy in memory", "torch", "copy", {"bytes": length}, ms=timing.ms, bytes=2 * length,
            spread=timing.spread, note="bytes read and written",
        )  # fmt: skip

    def launch() -> Iterator[BenchRow]:
        x = torch.zeros(1, device=bench.device)

        def many() -> None:
            for _ in range(100):
                x.add_(1)

        timing = bench.clock.time(many)
        yield BenchRow("ceilings", "100 kernels that do nothing", "torch", "step", ms=timing.ms, spread=timing.spread)

    yield from (BenchJob("square product", product), BenchJob("copy in memory", copy), BenchJob("launches", launch))


def dense(bench: Bench) -> Iterator[BenchJob]:
    yield BenchJob("missing precisions", lambda: missing("dense", bench))
    for name, (out, width) in matrices(bench.dry).items():
        for tokens in (64,) if bench.dry else (2048, 8192, 32768):
            yield BenchJob(f"{name}, {tokens} tokens", partial(_dense, bench, name, out, width, tokens))


def _dense(bench: Bench, name: str, out: int, width: int, tokens: int) -> Iterator[BenchRow]:
    x, w = bench.random(tokens, width), bench.random(out, width, seed=1, scale=width**-0.5)
    shape: dict[str, int | str] = {"M": tokens, "N": out, "K": width}
    grad = bench.random(tokens, out, seed=2)
    for side, config in bench.precisions.items():
        product = ProductCase(x, w, grad, None, backend(bench, config))
        yield from _checked(bench, "dense", name, side, shape, tokens, None, product)


def grouped(bench: Bench) -> Iterator[BenchJob]:
    """Time grouped matmuls: bfloat16 first, because FP8 backends that loop over experts are slow."""
    sides = list(bench.precisions)
    yield BenchJob("agreement with the emulation", lambda: agreements(bench))
    for chosen in ([PLAIN], [side for side in sides if side != PLAIN]):
        for moe in moe_shapes(bench.dry, bench.memory_bytes):
            for which in ("gate and up", "down"):
                for tokens, load in _loads(bench.dry)[: None if chosen == [PLAIN] else 2]:
                    name = f"{moe.name}, {which}"
                    measure = partial(_grouped, bench, moe, which, tokens, load, chosen)
                    yield BenchJob(f"{name}, {tokens} tokens, {load}, {', '.join(chosen)}", measure)


def _loads(dry: bool) -> list[tuple[int, str]]:
    if dry:
        return [(128, "zipf")]
    return [(16384, "balanced"), (16384, "zipf"), (4096, "balanced"), (32768, "balanced")]


def _grouped(bench: Bench, moe: MoEShape, which: str, tokens: int, load: str, sides: list[str]) -> Iterator[BenchRow]:
    out, width = (2 * moe.hidden, moe.width) if which == "gate and up" else (moe.width, moe.hidden)
    rows = tokens * moe.router.top_k
    counts_E = counts(rows, moe.experts, load)
    x, w = bench.random(rows, width), bench.random(moe.experts, out, width, seed=1, scale=width**-0.5)
    shape: dict[str, int | str] = {"C": rows, "N": out, "K": width, "E": moe.experts}
    shape |= {"rows_most": int(counts_E.max()), "rows_least": int(counts_E.min())}
    grad = bench.random(rows, out, seed=2)
    for side in sides:
        product = ProductCase(x, w, grad, Groups(counts_E.to(bench.device)), backend(bench, bench.precisions[side]))
        name = f"{moe.name}, {which}"
        yield from _checked(bench, "grouped", name, side, shape, tokens, load, product)


def _checked(
    bench: Bench, section: str, name: str, side: str, shape: dict[str, int | str], tokens: int, load: str | None,
    product: ProductCase,
) -> Iterator[BenchRow]:  # fmt: skip
    """Check a matmul in one precision, then time it if it is correct."""
    error = product.error()
    if not error < gate(side):
        failed = f"wrong: {error:.1e} from float32, allowed {gate(side):.0e}"
        yield BenchRow(section, name, side, "check", shape, tokens, load, error=error, gate=gate(side), failed=failed)
        return
    flops = 2.0 * product.x.numel() * product.w.shape[-2]
    moved = 2 * (product.x.numel() + product.w.numel() + product.grad.numel())
    for phase, side_, times in (("forward", product.forward_only, 1), ("forward+backward", product.both, 3)):
        timing = bench.clock.time(side_)
        yield _row(
            section, name, side, phase, shape, tokens, timing, flops * times, load=load, bytes=moved * times,
            error=error, gate=gate(side),
        )  # fmt: skip


def _row(
    section: str, name: str, side: str, phase: str, shape: dict[str, int | str], tokens: int, timing: Any,
    flops: float, **more: Any,
) -> BenchRow:  # fmt: skip
    return BenchRow(section, name, side, phase, shape, tokens, ms=timing.ms, spread=timing.spread, flops=flops, **more)


def agreements(bench: Bench) -> Iterator[BenchRow]:
    """Compare FP8 matmuls with the emulation of the same recipe, at the models' widths but with few tokens."""
    yield from missing("grouped", bench)
    reference = FLOAT8_LIBRARIES[Backend.emulated]
    for moe in moe_shapes(bench.dry, bench.memory_bytes):
        experts, rows = 4, 64 if bench.dry else 1024
        counts_E = counts(rows, experts, "zipf")
        x = bench.random(rows, moe.width)
        w = bench.random(experts, moe.hidden, moe.width, seed=1, scale=moe.width**-0.5)
        grad, groups = bench.random(rows, moe.hidden, seed=2), Groups(counts_E.to(bench.device))
        for side, config in bench.precisions.items():
            if side == PLAIN:
                continue
            emulated = Float8Gemm(reference.arithmetic(config.recipe.on(bench.device), torch.bfloat16), "reference")
            exact, product = (ProductCase(x, w, grad, groups, gemm) for gemm in (emulated, backend(bench, config)))
            error = max(map(distance, product.results(), exact.results()))
            bad = None if error < SAME_BYTES_GATE else f"{error:.1e} from the emulation, allowed {SAME_BYTES_GATE:.0e}"
            shape: dict[str, int | str] = {"C": rows, "N": moe.hidden, "K": moe.width, "E": experts}
            yield BenchRow(
                "grouped", moe.name, side, "check", shape, rows, "zipf", error=error, gate=SAME_BYTES_GATE,
                failed=bad, note="against the emulation of the same recipe",
            )  # fmt: skip


def missing(section: str, bench: Bench) -> Iterator[BenchRow]:
    for name, reason in bench.missing.items():
        yield BenchRow(section, "FP8", name, missing=reason)
