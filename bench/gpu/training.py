"""Measure training steps of our model and optimizer on synthetic tokens: speed, memory and the loss in FP8.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.clock import Timing
from bench.gpu.context import DENSE, PLAIN, Bench, BenchJob
from bench.gpu.record import BenchRow
from bench.gpu.shapes import LLAMA4
from model.config import BalanceConfig, ModelConfig, QKNorm, RouterConfig, Score, WeightsOn
from model.flops import count_parameters, training_flops
from model.load_balance import Balancer
from parallel.grad_norm import gradient_norm, scale_gradients
from parallel.layout import Layout
from parallel.mesh import meshes_of_rank
from parallel.parallelize import build
from parallel.sharding import local_gradients
from precision.config import Compute, KernelKind, ParamDtype, PrecisionConfig
from train.optim.config import Moments, OptimizerConfig
from train.optim.optimizer import make_optimizer

PEAK_TFLOPS = 989.0
"""Peak of an H100 or H200 SXM in dense bfloat16, by its data sheet. MFU is relative to it."""
MICRO_BATCHES = 4
"""Micro-batches per step: enough for the optimizer to take no larger a fraction of the time than in a real run."""
MOST_MS = 15e3
"""Milliseconds: if the steps so far took longer, 5 steps are enough; otherwise 12 are run."""
MOST_GAP = 5e-3
"""Largest relative gap between the losses of FP8 and bfloat16, each averaged over the last 20 steps."""

FINE = ModelConfig(
    vocab_size=50304,
    hidden_size=2048,
    num_layers=16,
    num_heads=16,
    num_kv_heads=4,
    expert_hidden_size=1024,
    shared_expert_hidden_size=0,
    num_experts=32,
    nope_every=0,
    attention_chunk_size=None,
    temperature=False,
    qk_norm=QKNorm.per_head,
    router=RouterConfig(top_k=8, score=Score.softmax, weights_on=WeightsOn.output, force_balanced=True),
)
SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    expert_hidden_size=512,
    num_experts=8,
    attention_chunk_size=None,
    router=LLAMA4,
    balance=BalanceConfig(bias_rate=1e-3),
)
TINY = replace(
    SMALL,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    expert_hidden_size=64,
    dense_hidden_size=64,
    num_experts=4,
)


class Training:
    """A model, its optimizer and the step that the trainer takes, without the trainer."""

    def __init__(
        self, config: ModelConfig, precision: PrecisionConfig, bench: Bench, moments: Moments, lr: float
    ) -> None:
        meshes = meshes_of_rank(Layout(dp_shard=1), 0)
        self.placed = build(config, precision, meshes, bench.device, seed=0)
        optimizer = OptimizerConfig(lr=lr, moments=moments)
        self.optimizer = make_optimizer(self.placed.model, self.placed.specs, optimizer, meshes)
        self.balancer = Balancer(self.placed.model)

    def step(self, tokens_BT: Tensor, micro_batches: int = 1) -> Tensor:
        """Return the mean loss per predicted token."""
        rows, length = tokens_BT.shape[0] // micro_batches, tokens_BT.shape[1] - 1
        positions_BT, tokens = torch.arange(length).expand(rows, -1), tokens_BT.shape[0] * length
        total = torch.zeros((), device=tokens_BT.device)
        for part_BT in tokens_BT.split(rows):
            context = self.placed.sequence_context(positions_BT, float(tokens))
            logits_BTV = self.placed.model(part_BT[:, :-1], context)
            wide, labels = logits_BTV.float().flatten(0, 1), part_BT[:, 1:].flatten()
            loss = F.cross_entropy(wide, labels, reduction="sum") / tokens
            loss.backward()
            total += loss.detach()
        gradients = local_gradients(self.placed.model, self.placed.specs)
        norm = gradient_norm(gradients, self.placed.meshes.world, self.placed.device)
        scale_gradients(self.placed.model, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.step()
        return total


def step(bench: Bench) -> Iterator[BenchJob]:
    """Time steps with float32 master weights and balanced experts. Moments are in bfloat16 on GPUs of up to 100 GB.

    bfloat16 runs with PyTorch and with Triton kernels, FP8 only with the kernels that were faster in bfloat16.
    """
    fine = replace(TINY, router=FINE.router, num_experts=16) if bench.dry else FINE
    masters = {name: replace(config, param_dtype=ParamDtype.master) for name, config in bench.precisions.items()}
    took: dict[KernelKind, float] = {}
    for side, precision in bench.with_kernels(masters).items():
        if precision.uses_float8 and precision.kernels is not min(took, key=took.__getitem__, default=KernelKind.torch):
            continue
        yield BenchJob(f"fine-grained, {side}", partial(_beside, bench, fine, side, precision, took))


def _beside(
    bench: Bench, fine: ModelConfig, side: str, precision: PrecisionConfig, took: dict[KernelKind, float]
) -> Iterator[BenchRow]:
    """Time an MoE model and then, in bfloat16, a dense model; both do not fit in memory at once. `took`: bfloat16's
    time per token with each kind of kernels. This function adds its measurement to it.
    """
    row = _step(bench, "fine-grained MoE", fine, side, precision)
    yield row
    if not precision.uses_float8 and row.ms and row.tokens:
        took[precision.kernels] = row.ms / row.tokens
        bench.clear()
        width = fine.router.top_k * fine.expert_hidden_size + fine.shared_hidden_size
        dense = _step(bench, DENSE, replace(fine, moe_every=0, dense_hidden_size=width), side, precision)
        yield dense
        ratio = row.ms / row.tokens / (dense.ms / dense.tokens) if dense.ms and dense.tokens else None
        goal: dict[str, Any] = {"floor": 1.30, "moonshot": 1.12, "at_most": True}
        yield replace(
            row, ms=None, flops=None, memory_bytes=None, note="time per token", ratio=ratio, against=DENSE, **goal
        )


def _step(bench: Bench, name: str, config: ModelConfig, side: str, precision: PrecisionConfig) -> BenchRow:
    """Time a step with the largest micro-batch that fits."""
    length, rows = (64, 1) if bench.dry else (4096, 4)
    while True:
        try:
            return _measured(bench, name, config, side, precision, rows, length)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2
        bench.clear()


def _measured(
    bench: Bench, name: str, config: ModelConfig, side: str, precision: PrecisionConfig, rows: int, length: int
) -> BenchRow:
    moments = Moments.float32 if bench.memory_bytes > 100e9 else Moments.bfloat16
    training = Training(config, precision, bench, moments, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    times: list[float] = []
    while len(times) < (2 if bench.dry else 5 if sum(times) > MOST_MS else 12):
        batch = torch.randint(config.vocab_size, (MICRO_BATCHES * rows, length + 1), generator=generator)
        batch = batch.to(bench.device)
        _wait(bench)
        begin = time.perf_counter()
        found = training.step(batch, MICRO_BATCHES)
        _wait(bench)
        times.append((time.perf_counter() - begin) * 1e3)
    timing, last_loss = Timing(times[1 if bench.dry else 3 :]), float(found)
    parameters, tokens = count_parameters(config), MICRO_BATCHES * rows * length
    flops = training_flops(config, length).total * tokens
    shape: dict[str, int | str] = {"B": rows, "T": length, "micro_batches": MICRO_BATCHES}
    shape |= {"total": parameters.total, "active": parameters.active}
    goal: dict[str, Any] = {"floor": 300.0, "moonshot": 400.0} if not precision.uses_float8 and config.moe_every else {}
    speed, mfu = tokens / timing.ms * 1e3, flops / timing.ms / 1e9 / PEAK_TFLOPS
    return BenchRow(
        "step",
        name,
        side,
        "step",
        shape,
        tokens,
        "balanced" if config.moe_every else None,
        ms=timing.ms,
        spread=timing.spread,
        flops=flops,
        memory_bytes=bench.peak_bytes,
        failed=None if math.isfinite(last_loss) else "the loss is not finite",
        note=f"{parameters.active / 1e9:.2f} B active of {parameters.total / 1e9:.2f} B, {speed:,.0f} tokens/s, "
        f"MFU {mfu:.1%} of {PEAK_TFLOPS:.0f}, moments in {moments.value}",
        **goal,
    )


def _wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def loss(bench: Bench) -> Iterator[BenchJob]:
    """Train 200 steps on a random Markov chain in float32, bfloat16 and FP8, from equal weights and on equal tokens."""
    sides = {"float32": PrecisionConfig(Compute.float32)}
    sides |= {name: replace(precision, param_dtype=ParamDtype.master) for name, precision in bench.precisions.items()}
    smooth: dict[str, float] = {}
    for side, precision in sides.items():
        yield BenchJob(side, partial(_losses, bench, side, precision, smooth))


def _losses(bench: Bench, side: str, precision: PrecisionConfig, smooth: dict[str, float]) -> Iterator[BenchRow]:
    """Train one side. `smooth`: mean loss over the last 20 steps by side, to which this function adds its own."""
    config, steps, rows, length = (TINY, 2, 2, 32) if bench.dry else (SMALL, 200, 16, 256)
    chain = _chain(config.vocab_size)
    training = Training(config, precision, bench, Moments.float32, lr=2e-3)
    begin = time.perf_counter()
    found = [training.step(_walk(chain, rows, length + 1, number).to(bench.device)) for number in range(steps)]
    values = [float(value) for value in found]
    ms = (time.perf_counter() - begin) * 1e3 / steps
    smooth[side] = statistics.mean(values[-20:])
    base = "float32" if side == PLAIN else PLAIN
    gap = smooth[side] / smooth[base] - 1 if base in smooth else None
    is_float8 = side not in (PLAIN, "float32")
    goal: dict[str, Any] = {"floor": MOST_GAP, "moonshot": MOST_GAP / 2, "at_most": True} if is_float8 else {}
    if gap is not None:
        goal |= {"ratio": abs(gap), "against": f"the loss of {base}"}
    failed = None if all(map(math.isfinite, values)) else "a loss is not finite"
    note = f"{values[0]:.4f} at first, {smooth[side]:.4f} over the last 20" + ("" if gap is None else f", {gap:+.2%}")
    name, shape = f"loss after {steps} steps of a small model", {"steps": steps, "B": rows, "T": length}
    yield BenchRow("loss", name, side, "step", {**shape}, rows * length, ms=ms, failed=failed, note=note, **goal)


def _chain(words: int) -> Tensor:
    """Return the cumulative probabilities of the next token, [words, words]. About six are likely after each token."""
    generator = torch.Generator().manual_seed(0)
    return (4 * torch.randn(words, words, generator=generator)).softmax(-1).cumsum(-1)


def _walk(chain: Tensor, rows: int, length: int, seed: int) -> Tensor:
    """Return token ids [B, T] that follow the Markov chain. They are the same for every side."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(length, rows, 1, generator=generator)
    words = [torch.randint(len(chain), (rows,), generator=generator)]
    for draw in draws[1:]:
        words.append(torch.searchsorted(chain[words[-1]], draw)[:, 0].clamp_max(len(chain) - 1))
    return torch.stack(words, 1)
