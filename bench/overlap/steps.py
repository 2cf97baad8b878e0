"""Steps on gloo ranks whose network takes a fixed time, with and without work that may hide it.

Shapes: T tokens of a rank, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from bench.overlap.slow import network, taking
from model.config import FeedForward, ModelConfig, RouterConfig
from model.moe import Dispatched, MixtureOfExperts, Pending, TopKRouting
from parallel import parallelize
from parallel.comm.world import connect
from parallel.layout import ParallelConfig, Recompute
from parallel.mesh import make_meshes
from precision.config import Compute, PrecisionConfig

T, D, LAYERS, STEPS = 64, 64, 16, 3
GATHERS = 2 * LAYERS + 3
"""Gathers of a step of `gather_seconds`: the layers in both passes, the embedding, the head and the rest."""
FIRST_HALF = 2 / 3
"""The part of a gated MLP's matmuls that is in its first half: gate and up of gate, up and down."""
SIZES = {"hidden_size": D, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "vocab_size": 64}
EXPERTS = {"num_experts": 8, "expert_hidden_size": 8, "shared_expert_hidden_size": 8, "dense_hidden_size": 64}


@dataclass(frozen=True)
class Times:
    """Seconds of the network and of the work in a step, which are fixed, of the longer of both in each pass, and of the
    fastest step on the slowest rank: with both, and where each collective is waited for at once.
    """

    network_s: float
    work_s: float
    least_s: float
    step_s: float
    waiting_s: float

    @property
    def ratio(self) -> float:
        """The step over `least_s`: 1 if the shorter part of each pass is hidden and nothing else takes time."""
        return self.step_s / self.least_s

    @property
    def waiting_ratio(self) -> float:
        return self.waiting_s / self.least_s


def moe_seconds(delay_s: float, work_s: float, top_k: int, recompute: Recompute, waits: bool) -> list[float]:
    """Return the seconds of steps, forward and backward, of a model with one MoE layer on this rank. Each exchange of
    tokens takes `delay_s`, and the shared expert `work_s` in both passes.
    """
    router = RouterConfig(top_k=top_k)
    config = ModelConfig(**SIZES, **EXPERTS, num_layers=1, router=router)  # type: ignore[arg-type]
    placed = _placed(config, ParallelConfig(ep=connect().size, recompute=recompute))
    moe = next(layer.ffn for layer in placed.model.layers.values())
    assert isinstance(moe, MixtureOfExperts)
    shared: Any = moe.shared
    forward_s = work_s / (4 if recompute is Recompute.full else 3)
    shared.first_half = taking(shared.first_half, FIRST_HALF * forward_s)
    shared.second_half = taking(shared.second_half, (1 - FIRST_HALF) * forward_s)
    if waits:
        moe.dispatch = partial(_waiting, moe.dispatch)
    return _seconds(placed, delay_s, T * D // 2, "all_to_all_single")


def _waiting(dispatch: Callable[..., Pending[Dispatched]], x_TD: Tensor, routing: TopKRouting) -> Pending[Dispatched]:
    """Wait for tokens where they are sent, as if the exchanges were synchronous."""
    rows = dispatch(x_TD, routing)()

    def combine(y_CD: Tensor) -> Callable[[], Pending[Tensor]]:
        send_back = rows.combine(y_CD)

        def sent_back() -> Pending[Tensor]:
            y_TD = send_back()()
            return lambda: y_TD

        return sent_back

    return lambda: Dispatched(rows.x_CD, rows.groups, combine)


def gather_seconds(delay_s: float, work_s: float, ahead: bool) -> list[float]:
    """Return the seconds of steps of dense layers under FSDP2. Each gather takes `delay_s`, and all layers together
    `work_s`, in equal parts. `ahead`: gathers are asynchronous, as on a stream of their own, which gloo lacks.
    """
    plain = ModelConfig(**SIZES, **EXPERTS, num_layers=LAYERS)  # type: ignore[arg-type]
    layers = [replace(layer, feed_forward=FeedForward.dense) for layer in plain.blocks]
    config = ModelConfig(**SIZES, **EXPERTS, num_layers=LAYERS, layer_list=layers)  # type: ignore[arg-type]
    placed = _placed(config, ParallelConfig())
    for layer in placed.model.layers.values():
        ffn: Any = layer.ffn
        ffn.second_half = taking(ffn.second_half, work_s / 3 / LAYERS)
    for unit in placed.model.modules():
        if isinstance(unit, FSDPModule):
            unit._set_unshard_async_op(ahead)
    return _seconds(placed, delay_s, D * D, "all_gather_single", "all_gather_into_tensor")


def _placed(config: ModelConfig, parallel: ParallelConfig) -> parallelize.ParallelModel:
    world = connect()
    meshes = make_meshes(parallel.resolve(world.size), world)
    return parallelize.build(config, PrecisionConfig(Compute.float32), meshes, world.device, seed=0)


def _seconds(placed: parallelize.ParallelModel, delay_s: float, at_least: int, *collectives: str) -> list[float]:
    """Return the seconds of some steps after the first. No rank begins a step before all have ended the last one."""
    tokens_1T = torch.arange(T)[None] % SIZES["vocab_size"]

    def step() -> float:
        dist.barrier()
        begin = time.monotonic()
        placed.model(tokens_1T, placed.sequence_context(torch.arange(T)[None])).sum().backward()
        return time.monotonic() - begin

    step()
    with network(delay_s, at_least, *collectives):
        return [step() for _ in range(STEPS)]
