"""Our mixture layer against transformers' Llama 4, Mixtral and Qwen3 blocks, and its growth with the number of experts.

Width 256, expert width 512, top-1 plus a shared expert, one thread, forward and backward. Equal weights, and equal
outputs asserted before anything is timed. A block without a shared expert gets ours added to its result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import Result, interleaved, median_ratio, spread
from model.config import ModelConfig, RouterConfig, Score, WeightsOn
from model.context import SequenceContext
from model.init import initialise
from model.moe import MixtureOfExperts
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve

WIDTH, HIDDEN = 256, 512
LLAMA4 = RouterConfig()
MIXTRAL = RouterConfig(score=Score.softmax, renormalise=True, weights_on=WeightsOn.output)


def our_layer(experts: int, dtype: torch.dtype, router: RouterConfig) -> MixtureOfExperts:
    config = ModelConfig(width=WIDTH, expert_width=HIDDEN, experts=experts, router=router)
    name = {torch.float32: Compute.float32, torch.bfloat16: Compute.bfloat16}[dtype]
    layer = MixtureOfExperts(config, resolve(PrecisionConfig(name)).plain)
    initialise(layer, config, seed=0)
    with torch.no_grad():
        layer.router.weight.mul_(10)  # clear choices: both sides must send a token to the same expert
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    return layer


def llama4_block(layer: MixtureOfExperts, dtype: torch.dtype) -> _Block:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    experts = layer.router.weight.shape[0]
    config = Llama4TextConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=experts, num_experts_per_tok=1, hidden_act="silu"
    )
    block = Llama4TextMoe(config).to(dtype)
    with torch.no_grad():
        block.router.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.gate_up.weight.flatten(1, 2).transpose(1, 2))
        block.experts.down_proj.copy_(layer.experts.down.weight.transpose(1, 2))
        assert layer.shared is not None
        for theirs, ours in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            getattr(block.shared_expert, theirs).weight.copy_(getattr(layer.shared, ours).weight)
    return _Block(block, lambda x: block(x)[0].view_as(x))


def grouped_block(kind: str, layer: MixtureOfExperts, dtype: torch.dtype) -> _Block:
    """Mixtral's or Qwen3's routed block on transformers' grouped products, with a copy of our shared expert added."""
    import copy

    experts = layer.router.weight.shape[0]
    if kind == "Mixtral":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config: Any = MixtralConfig(
            hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=experts, num_experts_per_tok=1
        )
        config._experts_implementation = "grouped_mm"
        block: Any = MixtralSparseMoeBlock(config)
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        config = Qwen3MoeConfig(
            hidden_size=WIDTH,
            moe_intermediate_size=HIDDEN,
            num_experts=experts,
            num_experts_per_tok=1,
            norm_topk_prob=True,
        )
        config._experts_implementation = "grouped_mm"
        block = Qwen3MoeSparseMoeBlock(config)
    block = block.to(dtype)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.gate_up.weight.flatten(1, 2))
        block.experts.down_proj.copy_(layer.experts.down.weight)
    assert layer.shared is not None
    shared = copy.deepcopy(layer.shared)

    def forward(x: Tensor) -> Tensor:
        y = block(x)
        return (y[0] if isinstance(y, tuple) else y) + shared(x)

    return _Block(nn.ModuleList([block, shared]), forward)


class _Block:
    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self.module, self.forward = module, forward

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.module.parameters()

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


class Case:
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


def our_case(layer: MixtureOfExperts, x: Tensor) -> Case:
    context = SequenceContext(torch.arange(x.shape[1]).expand(x.shape[:2]))
    return Case(lambda value: layer(value, context), layer.parameters(), x)


def assert_equal_outputs(ours: Case, theirs: Case) -> None:
    """Token by token. In bfloat16 the peers score experts in bfloat16 and we in float32, so that a few tokens whose two
    best experts nearly tie may go elsewhere: at most 2% of them.
    """
    narrow = ours.x.dtype is not torch.float32
    with torch.no_grad():
        a, b = ours.layer(ours.x).float(), theirs.layer(theirs.x).float()
    worst_T = (a - b).abs().amax(-1).flatten() / b.abs().max()
    differing = (worst_T > (3e-2 if narrow else 1e-4)).double().mean().item()
    if differing > (0.02 if narrow else 0.0):
        raise AssertionError(f"outputs of {differing:.1%} of the tokens differ: the comparison would be meaningless")


def tokens(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def against_llama4(experts: int, dtype: torch.dtype) -> Result:
    """T=4096; transformers' Llama 4 runs every token through every expert."""
    layer = our_layer(experts, dtype, LLAMA4)
    x = tokens(4096, dtype)
    ours, block = our_case(layer, x), llama4_block(layer, dtype)
    theirs = Case(block, block.parameters(), x)
    assert_equal_outputs(ours, theirs)
    a, b = interleaved([ours, theirs], rounds=3 if experts > 16 else 5, warmup=1)
    speedup = 1 / median_ratio(a, b)
    floor, holds = (">= 12 times", speedup >= 12) if experts == 64 else ("-", True)
    name = f"MoE layer vs transformers Llama 4, E={experts}, {_short(dtype)} (s; ratio theirs/ours)"
    return Result(name, statistics.median(a), statistics.median(b), speedup, floor, holds, "T=4096, 1 thread")


def against_grouped(kind: str, experts: int, dtype: torch.dtype) -> Result:
    layer = our_layer(experts, dtype, MIXTRAL)
    x = tokens(1024, dtype)
    ours, block = our_case(layer, x), grouped_block(kind, layer, dtype)
    theirs = Case(block, block.parameters(), x)
    assert_equal_outputs(ours, theirs)
    a, b = interleaved([ours, theirs], rounds=21)
    ratio = median_ratio(a, b)
    note = f"T=1024, 1 thread, rounds spread {spread(a):.0%}"
    name = f"MoE layer vs transformers {kind} grouped, E={experts}, {_short(dtype)} (s)"
    return Result(name, statistics.median(a), statistics.median(b), ratio, "<= 1.1", ratio <= 1.1, note)


def growth(dtype: torch.dtype, note: str) -> Result:
    """Time at 128 experts over time at 8, same active parameters."""
    x = tokens(16384, dtype)
    cases = [our_case(our_layer(experts, dtype, LLAMA4), x) for experts in (128, 8)]
    many, few = interleaved(cases, rounds=7)
    ratio = median_ratio(many, few)
    name = f"MoE layer, 128 experts vs 8, {_short(dtype)} (s)"
    return Result(
        name, statistics.median(many), statistics.median(few), ratio, "<= 2.0", ratio <= 2.0, f"T=16384, {note}"
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def run() -> list[Result]:
    torch.set_num_threads(1)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [against_llama4(experts, dtype) for experts in (4, 16, 64)]
        found += [against_grouped(kind, e, dtype) for kind in ("Mixtral", "Qwen3") for e in (4, 16, 64, 128)]
    return found


def run_growth() -> list[Result]:
    """By itself: glibc's handling of large blocks differs between the two ways it is called."""
    import os

    torch.set_num_threads(1)
    tuned = "MALLOC_MMAP_THRESHOLD_" in os.environ
    note = "mmap threshold and trim off" if tuned else "glibc as it is"
    return [growth(dtype, note) for dtype in (torch.float32, torch.bfloat16)]
