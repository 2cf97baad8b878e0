"""Measure training steps of our model and optimizer on synthetic tokens: speed, memory and the loss in FP8.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.clock import Timing
from bench.gpu.context import DENSE, PLAIN, Bench, BenchJob
from bench.gpu.documents import count, packed_flops, packed_positions
from bench.gpu.record import BenchRow
from bench.gpu.shapes import LLAMA4
from bench.gpu.split import Span, divided, observed
from model.config import BalanceConfig, ModelConfig, QKNorm, RouterConfig, Score, WeightsOn
from model.flops import count_parameters, peak_flops
from model.load_balance import Balancer
from parallel.grad_norm import gradient_norm, scale_gradients
from parallel.layout import Layout
from parallel.mesh import meshes_of_rank
from parallel.parallelize import build
from parallel.sharding import local_gradients
from precision.config import Compute, KernelKind, ParamDtype, PrecisionConfig
from train.optim.config import Moments, OptimizerConfig
from train.optim.optimizer import make_optimizer

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
    """A model, its optimizer and the step of `train.engine`, which needs more libraries than torch; a test compares the
    two.
    """

    def __init__(
        self, config: ModelConfig, precision: PrecisionConfig, bench: Bench, moments: Moments, lr: float
    ) -> None:
        meshes = meshes_of_rank(Layout(dp_shard=1), 0)
        self.placed = build(config, precision, meshes, bench.device, seed=0)
        optimizer = OptimizerConfig(lr=lr, moments=moments)
        self.optimizer = make_optimizer(self.placed.model, self.placed.specs, optimizer, meshes)
        self.balancer = Balancer(self.placed.model)
        self.placed.model.clock.tick()

    def step(self, tokens_BT: Tensor, micro_batches: int = 1, positions_BT: Tensor | None = None) -> Tensor:
        """Return the mean loss per predicted token. `positions_BT`: positions in packed documents, on the host; None:
        each sequence is one document.
        """
        rows, length = tokens_BT.shape[0] // micro_batches, tokens_BT.shape[1] - 1
        if positions_BT is None:
            positions_BT = torch.arange(length).expand(len(tokens_BT), -1)
        tokens = tokens_BT.shape[0] * length
        total = torch.zeros((), device=tokens_BT.device)
        for part_BT, places_BT in zip(tokens_BT.split(rows), positions_BT.split(rows), strict=True):
            context = self.placed.sequence_context(places_BT, float(tokens))
            context.labels_BT = part_BT[:, 1:]
            self.placed.prepare(context)
            loss = self.placed.model(part_BT[:, :-1], context).sum() / tokens
            loss.backward()
            total += loss.detach()
        gradients = local_gradients(self.placed.model, self.placed.specs)
        norm = gradient_norm(gradients, self.placed.meshes.world, self.placed.device)
        scale_gradients(self.placed.model, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.placed.model.clock.tick()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.step()
        return total


@dataclass(frozen=True)
class _Load:
    """What a step trains on. `balanced`: every expert gets as many tokens; otherwise the router chooses. `packed`:
    documents of log-normal lengths; otherwise a sequence is one document.
    """

    balanced: bool
    packed: bool = True

    def __str__(self) -> str:
        return "packed documents" if self.packed else "whole sequences"

    def of(self, config: ModelConfig) -> ModelConfig:
        return replace(config, router=replace(config.router, force_balanced=self.balanced))


def step(bench: Bench) -> Iterator[BenchJob]:
    """Time steps with float32 master weights. Moments are in bfloat16 on GPUs of up to 100 GB.

    bfloat16 runs with PyTorch and with Triton kernels, FP8 only with the kernels that were faster in bfloat16. Packed
    documents come with balanced experts and with the router's own choice, in the default kernels only.
    """
    fine = replace(TINY, router=FINE.router, num_experts=16) if bench.dry else FINE
    masters = {name: replace(config, param_dtype=ParamDtype.master) for name, config in bench.precisions.items()}
    took: dict[KernelKind, float] = {}
    default = PLAIN + bench.default_kernels
    for side, precision in bench.with_kernels({PLAIN: masters.pop(PLAIN)}).items():
        work = partial(_beside, bench, fine, side, precision, took)
        yield BenchJob(f"fine-grained, {side}", work)
        if side == default:
            for load in (_Load(balanced=False), _Load(balanced=True, packed=False)):
                yield BenchJob(f"fine-grained, {load}, {side}", partial(_split, bench, fine, side, precision, load))
    for side, precision in bench.with_kernels(masters).items():
        if precision.kernels is min(took, key=took.__getitem__, default=KernelKind.torch):
            work = partial(_split, bench, fine, side, precision, _Load(balanced=True))
            yield BenchJob(f"fine-grained, {side}", work)


def _split(bench: Bench, fine: ModelConfig, side: str, precision: PrecisionConfig, load: _Load) -> Iterator[BenchRow]:
    """Time a step, then profile one, and yield the milliseconds of each class of kernels."""
    row, spans, wall_ms = _step(bench, f"fine-grained MoE, {load}", fine, side, precision, load)
    yield row
    for kind, ms in divided(spans, wall_ms).items():
        name, note = f"{row.name}: {kind.value}", f"{ms / wall_ms:.1%} of a step under the profiler"
        yield BenchRow("step", name, side, "split", row.shape, row.tokens, row.load, ms=ms, note=note)


def _beside(
    bench: Bench, fine: ModelConfig, side: str, precision: PrecisionConfig, took: dict[KernelKind, float]
) -> Iterator[BenchRow]:
    """Time an MoE model and then a dense model; both do not fit in memory at once. `took`: the time per token with each
    kind of kernels. This function adds its measurement to it.
    """
    load = _Load(balanced=True)
    row, *others = _split(bench, fine, side, precision, load)
    yield from (row, *others)
    if not row.ms or not row.tokens:
        return
    took[precision.kernels] = row.ms / row.tokens
    bench.clear()
    width = fine.router.top_k * fine.expert_hidden_size + fine.shared_hidden_size
    dense, *_ = _step(bench, DENSE, replace(fine, moe_every=0, dense_hidden_size=width), side, precision, load)
    yield dense
    ratio = row.ms / row.tokens / (dense.ms / dense.tokens) if dense.ms and dense.tokens else None
    goal = (1.30, 1.12) if side == PLAIN + bench.default_kernels else (None, None)
    yield replace(
        row, ms=None, flops=None, memory_bytes=None, note="time per token", ratio=ratio, against=DENSE, floor=goal[0],
        moonshot=goal[1], at_most=True,
    )  # fmt: skip


Measured = tuple[BenchRow, list[Span], float]
"""A row, and the kernels and the milliseconds of one step under the profiler."""


def _step(bench: Bench, name: str, config: ModelConfig, side: str, precision: PrecisionConfig, load: _Load) -> Measured:
    """Time a step with the largest micro-batch that fits."""
    length, rows = (64, 1) if bench.dry else (8192, 2)
    while True:
        try:
            return _measured(bench, name, load.of(config), side, precision, load, rows, length)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2
        bench.clear()


def _measured(
    bench: Bench, name: str, config: ModelConfig, side: str, precision: PrecisionConfig, load: _Load, rows: int,
    length: int,
) -> Measured:  # fmt: skip
    moments = Moments.float32 if bench.memory_bytes > 100e9 else Moments.bfloat16
    training, sequences = Training(config, precision, bench, moments, lr=1e-4), MICRO_BATCHES * rows
    positions = packed_positions(sequences, length) if load.packed else torch.arange(length).repeat(sequences, 1)
    generator, times = torch.Generator().manual_seed(0), list[float]()
    while len(times) < (2 if bench.dry else 5 if sum(times) > MOST_MS else 12):
        batch = _zipf(config.vocab_size, (sequences, length + 1), generator).to(bench.device)
        _wait(bench)
        begin = time.perf_counter()
        found = training.step(batch, MICRO_BATCHES, positions)
        _wait(bench)
        times.append((time.perf_counter() - begin) * 1e3)
    timing, last_loss = Timing(times[1 if bench.dry else 3 :]), float(found)
    peak = bench.peak_bytes
    parts = 1 if bench.dry else MICRO_BATCHES  # the profiler is slow to read the many operators of a CPU
    some, places = batch[: parts * rows], positions[: parts * rows]
    spans, wall_ms = observed(lambda: training.step(some, parts, places), bench.device)
    parameters, tokens = count_parameters(config), sequences * length
    flops = packed_flops(config, positions) * tokens
    shape: dict[str, int | str] = {"B": rows, "T": length, "micro_batches": MICRO_BATCHES}
    shape |= {"documents": count(positions), "total": parameters.total, "active": parameters.active}
    is_default = side == PLAIN + bench.default_kernels and load == _Load(balanced=True)
    goal: dict[str, Any] = {"floor": 300.0, "moonshot": 400.0} if config.moe_every and is_default else {}
    speed, fastest = tokens / timing.ms * 1e3, peak_flops(bench.device)
    mfu = "no MFU" if fastest is None else f"MFU {flops / timing.ms * 1e3 / fastest:.1%} of {fastest / 1e12:g} TFLOP/s"
    row = BenchRow(
        "step", name, side, "step", shape, tokens, _load_name(config, load), ms=timing.ms, spread=timing.spread,
        flops=flops, memory_bytes=peak, failed=None if math.isfinite(last_loss) else "the loss is not finite",
        note=f"{parameters.active / 1e9:.2f} B active of {parameters.total / 1e9:.2f} B, {speed:,.0f} tokens/s, "
        f"{mfu}, moments in {moments.value}",
        **goal,
    )  # fmt: skip
    return row, spans, wall_ms


def _load_name(config: ModelConfig, load: _Load) -> str | None:
    if not config.moe_every:
        return None
    return "balanced" if load.balanced else "routed"


def _zipf(words: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return token ids [B, T] with Zipf's frequencies, as in text, so that experts get different numbers of tokens."""
    weights = 1 / torch.arange(1, words + 1, dtype=torch.float32)
    return torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator).view(shape)


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
