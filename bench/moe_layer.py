"""Compare our MoE layer with others; measure its cost by number of experts, and the fraction that dispatch takes.

Hidden size 256, expert hidden size 512, top-1 plus a shared expert, one thread, forward and backward. Weights are
equal on both sides, and outputs are compared before anything is timed.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import Result, interleaved, median_ratio, spread
from bench.peers import GROUPED, LLAMA4, Peer
from model.attention.plan import ForwardContext
from model.config import ModelConfig, RouterConfig, Score, WeightsOn
from model.init import initialise
from model.moe import MixtureOfExperts, TopKRouting
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve

WIDTH, HIDDEN = 256, 512
INPUT_WEIGHTED = RouterConfig()
OUTPUT_WEIGHTED = RouterConfig(score=Score.softmax, norm_topk_prob=True, weights_on=WeightsOn.output)


def our_layer(experts: int, dtype: torch.dtype, router: RouterConfig) -> MixtureOfExperts:
    config = ModelConfig(hidden_size=WIDTH, expert_hidden_size=HIDDEN, num_experts=experts, router=router)
    name = {torch.float32: Compute.float32, torch.bfloat16: Compute.bfloat16}[dtype]
    layer = MixtureOfExperts(config, resolve(PrecisionConfig(name)).plain)
    initialise(layer, config, seed=0)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    return layer


class GrowthCase:
    """A layer, its input and a fixed upstream gradient; calling it runs forward and backward."""

    def __init__(self, layer: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter], x: Tensor) -> None:
        self.layer, self.parameters = layer, list(parameters)
        self.x = x.clone().requires_grad_()
        self.gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)

    def __call__(self) -> None:
        self.layer(self.x).backward(self.gradient)
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None


def our_case(layer: MixtureOfExperts, x: Tensor) -> GrowthCase:
    context = ForwardContext(torch.arange(x.shape[1]).expand(x.shape[:2]))
    return GrowthCase(lambda value: layer(value, context), layer.parameters(), x)


def their_case(peer: Peer, layer: MixtureOfExperts, router: RouterConfig, x: Tensor) -> GrowthCase:
    """Return the case of a peer that computes the shared expert itself."""
    block = peer.make(layer, router, True)
    return GrowthCase(block.forward, block.parameters, x)


def assert_equal_outputs(ours: GrowthCase, theirs: GrowthCase, casts: torch.dtype | None = None) -> None:
    """Compare outputs of every token, which also shows equal routing. `casts`: dtype of the peer's matmuls."""
    narrow = torch.bfloat16 in (ours.x.dtype, casts)
    with torch.no_grad():
        a, b = ours.layer(ours.x).float(), theirs.layer(theirs.x).float()
    worst = ((a - b).abs().max() / b.abs().max()).item()
    if not worst <= (3e-2 if narrow else 1e-4):
        raise AssertionError(f"outputs differ by {worst:.1e} of the largest: timing them would be meaningless")


def tokens(count: int, layer: MixtureOfExperts) -> Tensor:
    """Return tokens [1, count, D], each near a random row of the router's weight. Otherwise two scores of some tokens
    would nearly tie, and peers, which compute scores in bfloat16, would route these tokens to other experts than we do.
    One token more can make an expert's matmul 18% slower.
    """
    generator = torch.Generator().manual_seed(0)
    rows_ED = layer.router.weight.detach().float()
    drawn = torch.randint(len(rows_ED), (count,), generator=generator)
    x = torch.randn(count, WIDTH, generator=generator) + 8 * F.normalize(rows_ED, dim=-1)[drawn]
    return x[None].to(layer.router.weight.dtype)


def against_llama4(experts: int, dtype: torch.dtype) -> Result:
    """Compare with transformers' Llama 4, which runs every token through every expert, at T=4096."""
    name = f"MoE layer vs transformers Llama 4, E={experts}, {_short(dtype)} (s; ratio theirs/ours)"
    if LLAMA4.missing:
        return _not_measured(name, LLAMA4)
    layer = our_layer(experts, dtype, INPUT_WEIGHTED)
    x = tokens(4096, layer)
    ours, theirs = our_case(layer, x), their_case(LLAMA4, layer, INPUT_WEIGHTED, x)
    assert_equal_outputs(ours, theirs)
    a, b = interleaved([ours, theirs], rounds=3 if experts > 16 else 5, warmup=1)
    speedup = 1 / median_ratio(a, b)
    floor, holds = (">= 16 times", speedup >= 16) if experts == 64 else ("-", True)
    return Result(name, statistics.median(a), statistics.median(b), speedup, floor, holds, "T=4096, 1 thread")


def against_grouped(experts: int, dtype: torch.dtype) -> list[Result]:
    """Compare with the peers in `GROUPED`, all timed in the same rounds."""
    layer = our_layer(experts, dtype, OUTPUT_WEIGHTED)
    x = tokens(1024, layer)
    ours, found = our_case(layer, x), {}
    for name, peer in GROUPED.items():
        if not peer.missing:
            found[name] = their_case(peer, layer, OUTPUT_WEIGHTED, x)
            assert_equal_outputs(ours, found[name], peer.casts)
    a, *others = interleaved([ours, *found.values()], rounds=21)
    times, results = dict(zip(found, others, strict=True)), []
    for who, peer in GROUPED.items():
        name = f"MoE layer vs {who}, E={experts}, {_short(dtype)} (s)"
        if who not in times:
            results.append(_not_measured(name, peer))
            continue
        ratio, note = median_ratio(a, times[who]), f"T=1024, 1 thread, rounds spread {spread(a):.0%}"
        if peer.casts not in (None, dtype):
            note += f"; its experts cast to {_short(peer.casts)}"
        medians = (statistics.median(a), statistics.median(times[who]))
        results.append(Result(name, *medians, ratio, "<= 1.0", ratio <= 1.0, note))
    return results


def _not_measured(name: str, peer: Peer) -> Result:
    return Result(name, math.nan, math.nan, math.nan, "-", True, f"not measured, {peer.missing}")


def permutation(experts: int, dtype: torch.dtype) -> Result:
    """Measure the fraction of the layer's time that dispatch takes: to sort tokens by expert, permute, weight and
    combine them, forward and backward, with experts that return their input.
    """
    layer = our_layer(experts, dtype, OUTPUT_WEIGHTED)
    x = tokens(1024, layer)
    with torch.no_grad():
        experts_BTK, weights_BTK = layer.router(x, None)
    weights = nn.Parameter(weights_BTK.flatten(0, 1))

    def there_and_back(value: Tensor) -> Tensor:
        sent = layer.dispatch(value.flatten(0, 1), TopKRouting(experts_BTK.flatten(0, 1), weights))()
        return sent.combine(sent.x_CD)()().view_as(value)

    a, b = interleaved([GrowthCase(there_and_back, [weights], x), our_case(layer, x)], rounds=21)
    ratio, name = median_ratio(a, b), f"MoE layer, sort and permutation of the whole, E={experts}, {_short(dtype)} (s)"
    medians = (statistics.median(a), statistics.median(b))
    return Result(name, *medians, ratio, "<= 0.2", ratio <= 0.2, "T=1024, 1 thread; second column: the layer")


def growth(dtype: torch.dtype, note: str) -> Result:
    """Compare the time with 128 experts to the time with 8, at equal active parameters."""
    layers = [our_layer(experts, dtype, INPUT_WEIGHTED) for experts in (128, 8)]
    cases = [our_case(layer, tokens(16384, layer)) for layer in layers]
    many, few = interleaved(cases, rounds=7)
    ratio, name = median_ratio(many, few), f"MoE layer, 128 experts vs 8, {_short(dtype)} (s)"
    medians = (statistics.median(many), statistics.median(few))
    return Result(name, *medians, ratio, "<= 1.6", ratio <= 1.6, f"T=16384, {note}")


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def run() -> list[Result]:
    torch.set_num_threads(1)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [against_llama4(experts, dtype) for experts in (4, 16, 64)]
        for experts in (4, 16, 64, 128):
            found += [*against_grouped(experts, dtype), permutation(experts, dtype)]
    return found


def run_growth() -> list[Result]:
    """Measure `growth`. It is a benchmark of its own, to run under two settings of glibc's handling of large blocks."""
    torch.set_num_threads(1)
    tuned = "MALLOC_MMAP_THRESHOLD_" in os.environ
    note = "mmap threshold and trim off" if tuned else "glibc as it is"
    return [growth(dtype, note) for dtype in (torch.float32, torch.bfloat16)]
