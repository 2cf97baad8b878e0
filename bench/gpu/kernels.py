"""Compare Triton kernels with PyTorch in the memory-bound steps of a layer. Results are checked before timing.

Shapes: T tokens, D hidden size, K experts per token or head dim, C routed tokens, F expert hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu.clock import distance
from bench.gpu.context import Bench, BenchJob
from bench.gpu.documents import packed_positions
from bench.gpu.record import BenchRow
from bench.gpu.shapes import MoEShape, moe_shapes
from model.attention.rope import frequencies, rotation
from model.kernels import StepKernels, TorchKernels, TritonKernels
from model.kernels.heads import HeadStep
from model.moe import permute_by_expert

GATE = 1e-2
HEADS = {
    "Llama 4": (5120, HeadStep(40, 8, 128, norm_eps=1e-5)),
    "Qwen3 30B": (2048, HeadStep(32, 4, 128)),
}
"""Hidden size, and what is done to heads, by model. Heads of Qwen3 are normalised with a gain, before this step."""
TINY = {"tiny": (64, HeadStep(4, 2, 16, norm_eps=1e-5))}


@dataclass(frozen=True)
class _KernelStep:
    """What a step computes, the tensors that get gradients, and the bytes that it has to move at least."""

    compute: Callable[[StepKernels], Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]
    bytes: int

    def outputs(self, kernel: StepKernels) -> tuple[Tensor, ...]:
        found = self.compute(kernel)
        return (found,) if isinstance(found, Tensor) else found

    def results(self, kernel: StepKernels) -> list[Tensor]:
        found = self.outputs(kernel)
        generator = torch.Generator(found[0].device).manual_seed(4)
        grads = [torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype) for y in found]
        return [*(y.detach() for y in found), *torch.autograd.grad(found, self.leaves, grads)]

    def run(self, kernel: StepKernels, grads: list[Tensor]) -> None:
        torch.autograd.grad(self.outputs(kernel), self.leaves, grads)


def kernels(bench: Bench) -> Iterator[BenchJob]:
    if bench.no_triton and not bench.dry:
        yield BenchJob("triton", lambda: [BenchRow("kernels", "all", "triton", missing=bench.no_triton)])
        return
    tokens = 64 if bench.dry else 16384
    for name, (width, step) in (TINY if bench.dry else HEADS).items():
        yield BenchJob(f"{name}, norm and heads", partial(_of_heads, bench, name, tokens, width, step))
    for moe in moe_shapes(bench.dry, bench.memory_bytes)[:2]:
        yield BenchJob(moe.name, partial(_of_experts, bench, moe, tokens))


def _of_heads(bench: Bench, name: str, tokens: int, width: int, step: HeadStep) -> Iterator[BenchRow]:
    positions_BT = packed_positions(1, tokens)
    turns = rotation(positions_BT.to(bench.device), frequencies(step.head_dim, 500_000.0), torch.float32)
    count = sum(step.heads)
    qkv = bench.random(1, tokens, count * step.head_dim).requires_grad_()
    x, gain = bench.random(1, tokens, width, seed=1).requires_grad_(), torch.ones(width, device=bench.device)
    gain.requires_grad_()
    steps = {
        "rotation and norm of heads": _KernelStep(lambda k: k.heads(qkv, step, turns, None), [qkv], 10 * qkv.numel()),
        "norm": _KernelStep(lambda k: k.rms_norm(x, gain, 1e-5), [x, gain], 10 * x.numel()),
    }
    yield from _compared(bench, name, {"D": width, "H": count, "K": step.head_dim}, tokens, None, steps)


def _of_experts(bench: Bench, moe: MoEShape, tokens: int) -> Iterator[BenchRow]:
    top_k, generator = moe.router.top_k, torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, moe.experts, generator=generator).topk(top_k).indices
    rows = permute_by_expert(chosen.to(bench.device), moe.experts, 16)
    count, width, hidden = len(rows.source_C), moe.width, moe.hidden
    x_TD, y_CD = bench.random(tokens, width).requires_grad_(), bench.random(count, width, seed=1).requires_grad_()
    weights_TK = torch.rand(tokens, top_k, generator=generator).to(bench.device).requires_grad_()
    both_C2F = bench.random(count, 2 * hidden, seed=2).requires_grad_()
    one, many, moved = (2 * width * n for n in (tokens, count, tokens + count))  # bytes, in bfloat16
    steps = {
        "permute": _KernelStep(lambda k: k.permute(x_TD, rows), [x_TD], 2 * moved),
        "permute, weighted": _KernelStep(
            lambda k: k.permute(x_TD, rows, weights_TK), [x_TD, weights_TK], 2 * moved + one
        ),
        "unpermute": _KernelStep(lambda k: k.unpermute(y_CD, rows), [y_CD], 2 * moved),
        "unpermute, weighted": _KernelStep(
            lambda k: k.unpermute(y_CD, rows, weights_TK), [y_CD, weights_TK], 2 * moved + many
        ),
        "SwiGLU": _KernelStep(lambda k: k.swiglu_halves(both_C2F), [both_C2F], 16 * count * hidden),
    }  # fmt: skip
    yield from _compared(bench, moe.name, {"D": width, "F": hidden, "K": top_k, "C": count}, tokens, "routed", steps)


def _compared(
    bench: Bench, name: str, shape: dict[str, int | str], tokens: int, load: str | None, steps: dict[str, _KernelStep]
) -> Iterator[BenchRow]:
    # a dry run without Triton's interpreter times PyTorch twice, so that this code at least runs
    stands_in = bench.no_triton is not None
    torch_kernels: StepKernels = TorchKernels()
    triton_kernels: StepKernels = TorchKernels() if stands_in else TritonKernels()
    for what, step in steps.items():
        error = max(map(distance, step.results(triton_kernels), step.results(torch_kernels)))
        if not error < GATE:
            failed = f"wrong: {error:.1e} from the PyTorch kernel, allowed {GATE:.0e}"
            what = f"{name}, {what}"
            yield BenchRow("kernels", what, "triton", "check", shape, tokens, error=error, gate=GATE, failed=failed)
            continue
        grads = [torch.ones_like(y) for y in step.outputs(torch_kernels)]
        sides = [partial(step.run, kernel, grads) for kernel in (torch_kernels, triton_kernels)]
        torchs, tritons = bench.clock.turns(sides)
        for side, timing in (("torch", torchs), ("triton", tritons)):
            ratio, against = (timing.over(torchs), "torch") if side == "triton" else (None, None)
            yield BenchRow(
                "kernels", f"{name}, {what}", side, "forward+backward", shape, tokens, load, ms=timing.ms,
                spread=timing.spread, bytes=step.bytes, error=error, gate=GATE, ratio=ratio, against=against,
                note="PyTorch kernel in place of Triton" if stands_in and side == "triton" else "",
            )  # fmt: skip
