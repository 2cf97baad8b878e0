"""Time our MoE layer, forward and backward, in every precision and with all kernels, against a dense layer and peers.

Shapes: T tokens, D hidden size, E experts, K experts per token, F expert hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu.clock import Timing, distance
from bench.gpu.context import DENSE, PLAIN, TRITON, Bench, BenchJob
from bench.gpu.record import BenchRow
from bench.gpu.shapes import QWEN3, MoEShape, moe_shapes
from bench.peers import GROUPED, Peer
from model.attention.plan import ForwardContext
from model.config import ModelConfig, WeightsOn
from model.layers import GatedMLP
from model.moe import MixtureOfExperts
from model.roles import Role
from precision.config import PrecisionConfig
from precision.resolve import resolve

PLAIN_GATE = 2e-2
FLOAT8_GATE = 0.15
"""Largest error in FP8, after three matmuls in sequence, each of operands rounded to 3 bits of mantissa."""
DIFFERENT_TOKENS = 0.05
"""Largest fraction of tokens routed differently: peers compute router scores in bfloat16, we in float32."""


class TimedLayer:
    """A layer, its input and an upstream gradient; calling it runs forward and backward."""

    def __init__(
        self, layer: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, grad: Tensor
    ) -> None:
        self.layer, self.parameters, self.x, self.grad = layer, parameters, x.detach().requires_grad_(), grad

    def __call__(self) -> None:
        self.layer(self.x).backward(self.grad)
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None


@dataclass(frozen=True)
class LayerSetting:
    """Weights and input of one MoE layer, common to all sides."""

    bench: Bench
    moe: MoEShape
    base: MixtureOfExperts
    x: Tensor
    grad: Tensor

    @property
    def tokens(self) -> int:
        return self.x.shape[1]

    def row(self, what: str, side: str, **more: Any) -> BenchRow:
        name = f"{self.moe.name}, {what}"
        return BenchRow("layers", name, side, "forward+backward", self.moe.shape, self.tokens, **more)

    def ours(self, config: ModelConfig, precision: PrecisionConfig) -> TimedLayer:
        layer = sharing(self.base, config, self.bench, precision)
        context = ForwardContext(torch.arange(self.tokens).expand(1, -1), self.bench.device)
        return TimedLayer(lambda x: layer(x, context), list(layer.parameters()), self.x, self.grad)

    def dense(self, precision: PrecisionConfig) -> TimedLayer:
        roles = (Role.dense_gate, Role.dense_up, Role.dense_down)
        products = resolve(precision, self.bench.device).plain
        with torch.device(self.bench.device):
            layer = GatedMLP(self.moe.width, self.moe.active_width, roles, products).to(torch.bfloat16)
        _fill(layer, self.bench)
        return TimedLayer(layer, list(layer.parameters()), self.x, self.grad)


def layers(bench: Bench) -> Iterator[BenchJob]:
    if bench.no_triton:
        yield BenchJob("Triton", lambda: [BenchRow("layers", "layer", PLAIN + TRITON, missing=bench.no_triton)])
    for moe in moe_shapes(bench.dry, bench.memory_bytes):
        setting = cache(partial(_setting, bench, moe))  # made by the first job that uses it, freed with the last
        yield BenchJob(moe.name, partial(_ourselves, setting))
        yield BenchJob(f"{moe.name}, routed", partial(_by_load, setting))
        for name, peer in GROUPED.items():
            yield BenchJob(f"{moe.name}, {name}", partial(_against, setting, name, peer))


def _setting(bench: Bench, moe: MoEShape) -> LayerSetting:
    tokens = 64 if bench.dry else 16384
    x, grad = (bench.random(1, tokens, moe.width, seed=seed) for seed in (1, 2))
    return LayerSetting(bench, moe, made(moe.config(), bench), x, grad)


def _ourselves(make: Callable[[], LayerSetting]) -> Iterator[BenchRow]:
    """Time our layer in every precision and a dense layer, each with all kernels, in turn. Experts are balanced."""
    setting = make()
    bench, config = setting.bench, setting.moe.config(force_balanced=True)
    dense = bench.with_kernels({DENSE: bench.precisions[PLAIN]})
    sides = {side: setting.dense(precision) for side, precision in dense.items()}
    for side, precision in bench.with_kernels(bench.precisions).items():
        error = against_float32(sharing(setting.base, config, bench, precision), bench)
        gate = FLOAT8_GATE if precision.uses_float8 else PLAIN_GATE
        bench.clear()
        if error < gate:
            yield setting.row("layer", side, error=error, gate=gate, note="checked")
            sides[side] = setting.ours(config, precision)
        else:
            failed = f"wrong: {error:.1e} from float32, allowed {gate:.0e}"
            yield setting.row("layer", side, error=error, gate=gate, failed=failed)
    timings = dict(zip(sides, bench.clock.turns(list(sides.values())), strict=True))
    yield from _judged(setting, timings)


def _by_load(make: Callable[[], LayerSetting]) -> Iterator[BenchRow]:
    """Compare the layer with its own routing, of random tokens by a random router, with balanced experts."""
    setting = make()
    bench, moe = setting.bench, setting.moe
    ((side, precision),) = list(bench.with_kernels({PLAIN: bench.precisions[PLAIN]}).items())[-1:]
    loads = {"balanced": moe.config(force_balanced=True), "routed": moe.config()}
    cases = {load: setting.ours(config, precision) for load, config in loads.items()}
    timings = dict(zip(cases, bench.clock.turns(list(cases.values())), strict=True))
    for load, timing in timings.items():
        ratio, against = (timing.over(timings["balanced"]), "balanced") if load == "routed" else (None, None)
        more = {"flops": moe.flops(setting.tokens), "ratio": ratio, "against": against}
        yield setting.row("layer by load", side, ms=timing.ms, spread=timing.spread, load=load, **more)


def _judged(setting: LayerSetting, timings: dict[str, Timing]) -> Iterator[BenchRow]:
    """Yield a row per side, then ratios: bfloat16 to the dense layer, FP8 to bfloat16, Triton to PyTorch kernels."""
    moe, tokens, default = setting.moe, setting.tokens, setting.bench.default_kernels
    is_llama4 = moe.name.startswith("Llama 4")
    for side, timing in timings.items():
        products = side.removesuffix(TRITON)
        flops = 6.0 * tokens * 3 * moe.width * moe.active_width if products == DENSE else moe.flops(tokens)
        goal = {"floor": 450.0, "moonshot": 600.0} if is_llama4 and side == PLAIN + default else {}
        load = None if products == DENSE else "balanced"
        yield setting.row("layer", side, ms=timing.ms, spread=timing.spread, flops=flops, load=load, **goal)
    for side, timing in timings.items():
        products = side.removesuffix(TRITON)
        kernels = side.removeprefix(products)
        plain = timings.get(PLAIN + kernels)
        if products == PLAIN:
            goal = {"floor": 1.30, "moonshot": 1.12, "at_most": True} if kernels == default else {}
            dense = DENSE + kernels
            ratio = timing.over(timings[dense])
            yield setting.row("time ratio", side, load="balanced", ratio=ratio, against=dense, **goal)
        elif plain is not None and products != DENSE:
            goal = {"floor": 1.3, "moonshot": 1.6} if is_llama4 and kernels == default else {}
            ratio = plain.over(timing)
            yield setting.row("speed ratio", side, load="balanced", ratio=ratio, against=PLAIN + kernels, **goal)
        if kernels and products in timings and products != DENSE:
            ratio = timings[products].over(timing)
            yield setting.row("speed ratio", side, load="balanced", ratio=ratio, against=products)


def _against(make: Callable[[], LayerSetting], name: str, peer: Peer) -> Iterator[BenchRow]:
    """Compare with a peer. Scores are softmax and weights apply to outputs, which peers support for any top_k."""
    setting = make()
    bench, moe = setting.bench, setting.moe
    if reason := peer.missing:
        yield setting.row("layer", name, missing=reason)
        return
    router = replace(QWEN3, top_k=moe.router.top_k)
    config = replace(moe.config(), router=router)
    plain = bench.with_kernels({PLAIN: bench.precisions[PLAIN]})
    sides = {side: setting.ours(config, precision) for side, precision in plain.items()}
    block = peer.make(setting.base, router, False)
    theirs = TimedLayer(block.forward, block.parameters, setting.x, setting.grad)
    with torch.no_grad():
        a, b = (case.layer(case.x).float() for case in (sides[PLAIN], theirs))
    worst_T = (a - b).abs().amax(-1) / b.abs().max()
    differing = float((worst_T > 3e-2).double().mean())
    if not differing <= DIFFERENT_TOKENS:
        yield setting.row("layer", name, failed=f"outputs of {differing:.1%} of the tokens differ from ours")
        return
    sides[name] = theirs
    timings = dict(zip(sides, bench.clock.turns(list(sides.values())), strict=True))
    for side, timing in timings.items():
        figures = {"ms": timing.ms, "spread": timing.spread, "flops": moe.flops(setting.tokens)}
        yield setting.row("layer", side, load="routed", **figures, note=f"{differing:.2%} of the tokens differ")
    for side in plain:
        ratio = timings[side].over(timings[name])
        yield setting.row("time ratio", side, load="routed", ratio=ratio, against=name)


def made(config: ModelConfig, bench: Bench) -> MixtureOfExperts:
    """Return an MoE layer in bfloat16 with normally distributed weights. Large router weights avoid near ties."""
    with torch.device("meta"):
        layer = MixtureOfExperts(config, resolve(bench.precisions[PLAIN], bench.device).plain)
    layer = layer.to(torch.bfloat16).to_empty(device=bench.device)
    _fill(layer, bench)
    with torch.no_grad():
        layer.router.weight.mul_(3)
    layer.router.balance.reset()
    return layer


def _fill(module: nn.Module, bench: Bench) -> None:
    generator = torch.Generator(bench.device).manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)


def sharing(base: MixtureOfExperts, config: ModelConfig, bench: Bench, precision: PrecisionConfig) -> MixtureOfExperts:
    """Return an MoE layer with the parameters of `base` (the same memory), in the given precision."""
    with torch.device("meta"):
        layer = MixtureOfExperts(config, resolve(precision, bench.device).at(0, 1))
    layer.load_state_dict(base.state_dict(), assign=True)
    layer.router.balance = base.router.balance
    return layer.requires_grad_()


def against_float32(layer: MixtureOfExperts, bench: Bench) -> float:
    """Return the error against a float32 loop over experts: the larger one of the output and the input's gradient."""
    tokens, width = 64 if bench.dry else 512, layer.router.weight.shape[1]
    x = bench.random(1, tokens, width, seed=3).requires_grad_()
    grad = bench.random(1, tokens, width, seed=4)
    y = layer(x, ForwardContext(torch.arange(tokens).expand(1, -1), bench.device))
    found = [y.detach(), *torch.autograd.grad(y, x, grad)]
    wide = x.detach().float().requires_grad_()
    exact = _plainly(layer, wide)
    wanted = [exact.detach(), *torch.autograd.grad(exact, wide, grad.float())]
    return max(map(distance, found, wanted))


def _plainly(layer: MixtureOfExperts, x_1TD: Tensor) -> Tensor:
    experts_1TK, weights_1TK = layer.router(x_1TD, None)
    x_TD, y_TD = x_1TD[0], torch.zeros_like(x_1TD[0])
    on_input = layer.router.config.weights_on is WeightsOn.input
    for expert, (gate_up, down) in enumerate(zip(layer.experts.gate_up.weight, layer.experts.down.weight, strict=True)):
        token, k = (experts_1TK[0] == expert).nonzero(as_tuple=True)
        weights = weights_1TK[0, token, k][:, None]
        rows = x_TD[token] * weights if on_input else x_TD[token]
        out = F.silu(rows @ gate_up[0].float().t()) * (rows @ gate_up[1].float().t()) @ down.float().t()
        y_TD = y_TD.index_add(0, token, out if on_input else out * weights)
    if layer.shared is not None:
        gate, up, down = (part.weight.float() for part in (layer.shared.gate, layer.shared.up, layer.shared.down))
        y_TD = y_TD + F.silu(x_TD @ gate.t()) * (x_TD @ up.t()) @ down.t()
    return y_TD[None]
