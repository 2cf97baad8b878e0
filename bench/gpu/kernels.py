"""Compare Triton kernels with PyTorch in the memory-bound steps of the MoE layer. Results are checked before timing.

Shapes: T tokens, D hidden size, K experts per token, C routed tokens, F expert hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.gpu.clock import distance
from bench.gpu.context import Bench, BenchJob
from bench.gpu.record import BenchRow
from bench.gpu.shapes import MoEShape, moe_shapes
from model.kernels import StepKernels, TorchKernels, TritonKernels
from model.moe import permute_by_expert

GATE = 1e-2
Step = Callable[[StepKernels], Tensor]


def kernels(bench: Bench) -> Iterator[BenchJob]:
    if bench.no_triton and not bench.dry:
        yield BenchJob("triton", lambda: [BenchRow("kernels", "all", "triton", missing=bench.no_triton)])
        return
    for moe in moe_shapes(bench.dry, bench.memory_bytes)[:2]:
        yield BenchJob(moe.name, partial(_measure, bench, moe))


def _measure(bench: Bench, moe: MoEShape) -> Iterator[BenchRow]:
    tokens, top_k = 64 if bench.dry else 16384, moe.router.top_k
    # a dry run without Triton's interpreter times PyTorch twice, so that this code at least runs
    stands_in = bench.no_triton is not None
    sides: dict[str, StepKernels] = {
        "torch": TorchKernels(),
        "triton": TorchKernels() if stands_in else TritonKernels(),
    }
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, moe.experts, generator=generator).topk(top_k).indices
    rows = permute_by_expert(chosen.to(bench.device), moe.experts, 16)
    count, width, hidden = len(rows.source_C), moe.width, moe.hidden
    x_TD, y_CD = bench.random(tokens, width).requires_grad_(), bench.random(count, width, seed=1).requires_grad_()
    weights_TK = torch.rand(tokens, top_k, generator=generator).to(bench.device).requires_grad_()
    both_C2F = bench.random(count, 2 * hidden, seed=2).requires_grad_()
    one, many, moved = (2 * width * n for n in (tokens, count, tokens + count))  # bytes, in bfloat16
    steps: dict[str, tuple[Step, list[Tensor], int, int]] = {
        "permute": (lambda k: k.permute(x_TD, rows), [x_TD], moved, moved),
        "permute, weighted": (lambda k: k.permute(x_TD, rows, weights_TK), [x_TD, weights_TK], moved, moved + one),
        "unpermute": (lambda k: k.unpermute(y_CD, rows), [y_CD], moved, moved),
        "unpermute, weighted": (
            lambda k: k.unpermute(y_CD, rows, weights_TK), [y_CD, weights_TK], moved, moved + many,
        ),
        "SwiGLU": (lambda k: k.swiglu_halves(both_C2F), [both_C2F], 6 * count * hidden, 10 * count * hidden),
    }  # fmt: skip
    shape: dict[str, int | str] = {"D": width, "F": hidden, "K": top_k, "C": count}
    for name, (step, leaves, forward_bytes, backward_bytes) in steps.items():
        found = {side: _results(step, kernel, leaves) for side, kernel in sides.items()}
        error = max(map(distance, found["triton"], found["torch"]))
        what = f"{moe.name}, {name}"
        if not error < GATE:
            failed = f"wrong: {error:.1e} from the PyTorch kernel, allowed {GATE:.0e}"
            yield BenchRow("kernels", what, "triton", "check", shape, tokens, error=error, gate=GATE, failed=failed)
            continue
        grad = torch.ones_like(found["torch"][0])
        runs = [partial(_run, step, kernel, leaves, grad) for kernel in sides.values()]
        torchs, tritons = bench.clock.turns(runs)
        for side, timing in (("torch", torchs), ("triton", tritons)):
            ratio, against = (timing.over(torchs), "torch") if side == "triton" else (None, None)
            yield BenchRow(
                "kernels", what, side, "forward+backward", shape, tokens, "routed", ms=timing.ms, spread=timing.spread,
                bytes=forward_bytes + backward_bytes, error=error, gate=GATE, ratio=ratio, against=against,
                note="PyTorch kernel in place of Triton" if stands_in and side == "triton" else "",
            )  # fmt: skip


def _results(step: Step, kernel: StepKernels, leaves: list[Tensor]) -> list[Tensor]:
    y = step(kernel)
    grad = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(4), device=y.device, dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _run(step: Step, kernel: StepKernels, leaves: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(step(kernel), leaves, grad)
