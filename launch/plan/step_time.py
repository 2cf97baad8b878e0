"""Predict the seconds of an optimizer step.

A layer's time is that of its products, its attention, its elementwise kernels and the collectives that nothing hides,
but at least the host's time to launch it. Stages of layers go through a simulated pipeline; data parallelism and the
optimizer come on top. FLOPs follow `launch.plan.workload`, bytes follow docs/plan.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache, cached_property

from launch.plan.calibration import Calibration
from launch.plan.cluster import Generation
from launch.plan.pipeline import ChunkTime, PipelineTime, simulate_pipeline
from launch.plan.stages import PlanStage, parameters, split_layers
from launch.plan.traffic import Exchange, layer_exchanges, state_exchanges
from launch.plan.workload import AttentionKernel, Job, ProductDtype, Sharding, Software

Seconds = float
Pipeline = Callable[[list[list[ChunkTime]], int, Seconds], PipelineTime]


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer and micro-batch, both passes, by cause. `forward`: share of the device's time."""

    products: Seconds = 0.0
    attention: Seconds = 0.0
    elementwise: Seconds = 0.0
    recomputed: Seconds = 0.0
    tp: Seconds = 0.0
    cp: Seconds = 0.0
    ep: Seconds = 0.0
    host: Seconds = 0.0
    """Seconds that the device waits for the host."""

    @cached_property
    def total(self) -> Seconds:
        return sum(getattr(self, name) for name in CAUSES)


CAUSES = tuple(one.name for one in fields(LayerTime))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest rank, by cause. The causes of a layer are those of the busiest stage."""

    products: Seconds
    attention: Seconds
    elementwise: Seconds
    recomputed: Seconds
    tp: Seconds
    cp: Seconds
    ep: Seconds
    host: Seconds
    head: Seconds
    bubble: Seconds
    data: Seconds
    optimizer: Seconds

    @property
    def total(self) -> Seconds:
        return sum(getattr(self, one.name) for one in fields(self))


def step_time(job: Job, calibration: Calibration, pipeline: Pipeline = simulate_pipeline) -> StepTime:
    """Return the predicted time of a step. `pipeline`: how stages become a pipeline."""
    stages = split_layers(job)
    kinds = _Layers(job, calibration)
    head = head_time(job, calibration)
    slow = calibration.slow_batch_s if job.axes.pp > 1 and "slow_batches" in job.traits else 0.0
    chunks = []
    for stage in stages:
        times = [[kinds.of(layer) for layer in chunk] for chunk in stage.chunks]
        found = [sum(one.total for one in chunk) for chunk in times]
        ends = [0.0] * len(found)
        if stage.head:
            ends[-1] += head * (1 + job.shapes.mtp)
            ends[-1] += slow
        chunks.append([_split(job, time, end) for time, end in zip(found, ends, strict=True)])
    sent = _send_time(job, calibration)
    piped = pipeline(chunks, job.micro_batches, sent)
    busiest = max(range(len(stages)), key=lambda at: sum(chunk.total for chunk in chunks[at]))
    layers = [kinds.of(layer) for layer in stages[busiest].layers]
    counts = Counter(layers)
    parts = {
        name: job.micro_batches * sum(getattr(layer, name) * count for layer, count in counts.items())
        for name in CAUSES
    }
    parts["host"] += job.micro_batches * slow * stages[busiest].head
    last = max(sum(chunk.backward for chunk in stage) for stage in chunks)
    data = max(_data_time(job, stage, last, calibration) for stage in stages)
    if job.sharding is Sharding.parameters:
        data += _gather_time(job, stages[busiest], sum(parts.values()) / job.micro_batches, calibration)
    optimizer = max(_optimizer_time(job, stage, calibration) for stage in stages)
    return StepTime(
        **parts,
        head=job.micro_batches * head * (1 + job.shapes.mtp) * stages[busiest].head,
        bubble=piped.total - piped.busy,
        data=data,
        optimizer=optimizer,
    )


class _Layers:
    """Times of layers, computed once for each kind."""

    def __init__(self, job: Job, calibration: Calibration) -> None:
        self._job, self._calibration = job, calibration
        self._known: dict[tuple[bool, float], LayerTime] = {}

    def of(self, layer: int) -> LayerTime:
        shapes = self._job.shapes
        key = (shapes.is_moe[layer], shapes.reach(layer, self._job.seq))
        if key not in self._known:
            self._known[key] = layer_time(self._job, layer, self._calibration)
        return self._known[key]


def layer_time(job: Job, layer: int, calibration: Calibration) -> LayerTime:
    """Return the time of a layer for one micro-batch, forward and backward."""
    is_moe = job.shapes.is_moe[layer]
    products = sum(product_time(job, calibration, *shape) for shape in _products(job, is_moe))
    attention = _attention_time(job, layer, calibration)
    elementwise = _elementwise_time(job, is_moe, calibration)
    waits = dict.fromkeys(("tp", "cp", "ep"), 0.0)
    for exchange in layer_exchanges(job, is_moe):
        waits[exchange.axis] += exchange_time(job, exchange, calibration) * _exposed(job, exchange.axis, calibration)
    forward = products / 3 + attention / 3.5 + elementwise / 2.6
    recomputed = _recomputed(job, is_moe, products / 3, attention / 3.5, elementwise / 2.6, waits)
    device = 3.0 * forward - forward * 3.0 + products + attention + elementwise + recomputed + sum(waits.values())
    host = _host_time(job, is_moe, calibration)
    stalled = (device**4 + host**4) ** 0.25 - device  # a smooth maximum: part of the launches runs ahead
    return LayerTime(products, attention, elementwise, recomputed, waits["tp"], waits["cp"], waits["ep"], stalled)


@cache
def _efficiency(generation: Generation, precision: ProductDtype) -> str:
    match generation:
        case Generation.ampere:
            return "product_ampere"
        case Generation.hopper:
            return "product_hopper_fp8" if precision.is_quantised else "product_hopper"
        case Generation.blackwell:
            if precision is ProductDtype.nvfp4:
                return "product_blackwell_fp4"
            return "product_blackwell_fp8" if precision.is_quantised else "product_blackwell"


def product_time(job: Job, calibration: Calibration, m: float, n: float, k: float, groups: int = 1) -> Seconds:
    """Return the seconds of a product m×k×n and of its two products in the backward pass, for each of `groups`.

    The rate falls where a side is narrow against the tile that the GPU needs to be busy, which grows with its FLOPs
    per byte.
    """
    gpu = job.gpu
    peak = gpu.peak(job.precision.value)
    balance = (peak / gpu.hbm) / (989.5e12 / 3352)
    tile = calibration.product_tile * balance
    rows = calibration.group_tile * balance if groups > 1 else tile
    slow = (1 + rows / m) * (1 + tile / n) * (1 + tile / k)
    rate = peak * gpu.power**calibration.power_exponent
    rate *= getattr(calibration, _efficiency(gpu.generation, job.precision))
    return groups * 6 * m * n * k * slow / rate


def _products(job: Job, is_moe: bool) -> Iterator[tuple[float, float, float, int]]:
    """Yield (m, n, k, groups) of a layer's products."""
    shapes, axes, tokens, h = job.shapes, job.axes, float(job.tokens), job.shapes.hidden
    query, key, value = shapes.query_size / axes.tp, shapes.key_size / axes.tp, shapes.value_size / axes.tp
    if shapes.latent is None:
        yield tokens, query + 2 * key, h, 1
    else:
        latent = shapes.latent
        if latent.query_rank:
            yield tokens, latent.query_rank, h, 1
            yield tokens, query, latent.query_rank, 1
        else:
            yield tokens, query, h, 1
        yield tokens, latent.key_rank + latent.rope_dim, h, 1
        yield tokens, shapes.heads * (latent.nope_dim + latent.value_dim) / axes.tp, latent.key_rank, 1
    yield tokens, h, value, 1
    wide = 2 if shapes.gated else 1
    if is_moe and shapes.experts is not None:
        moe = shapes.experts
        yield from _expert_products(job)
        if moe.shared_hidden:
            yield tokens, wide * moe.shared_hidden / axes.tp, h, 1
            yield tokens, h, moe.shared_hidden / axes.tp, 1
    else:
        yield tokens, wide * shapes.ffn / axes.tp, h, 1
        yield tokens, h, shapes.ffn / axes.tp, 1


def _expert_products(job: Job) -> Iterator[tuple[float, float, float, int]]:
    """Yield (m, n, k, groups) of the routed experts' products."""
    shapes, axes, moe = job.shapes, job.axes, job.shapes.experts
    assert moe is not None
    groups = max(1, moe.count // axes.ep)
    rows = float(job.tokens) / axes.tp * axes.etp * moe.top_k / groups
    yield rows, (2 if shapes.gated else 1) * moe.hidden / axes.etp, shapes.hidden, groups
    yield rows, shapes.hidden, moe.hidden / axes.etp, groups


def _attention_time(job: Job, layer: int, calibration: Calibration) -> Seconds:
    shapes, gpu, tp = job.shapes, job.gpu, job.axes.tp
    sizes = (shapes.query_size + shapes.value_size) / tp
    generation = gpu.generation.value
    if job.attention is AttentionKernel.unfused:
        scores = job.tokens * job.seq * shapes.heads / tp
        flops = 6 * job.tokens * job.seq * sizes
        rate = gpu.bf16 * 1e12 * getattr(calibration, f"product_{generation}") * 0.7
        return flops / rate + 26 * scores / (gpu.hbm * 1e9 * calibration.stream)
    flops = 3.5 * 2 * job.tokens * shapes.reach(layer, job.seq) * sizes
    rate = gpu.bf16 * 1e12 * getattr(calibration, f"attention_{generation}") * gpu.power**calibration.power_exponent
    rate *= min(1.0, 1.5 * shapes.head_dim / (shapes.head_dim + 64))  # the softmax costs the same for small heads
    if job.software is Software.fsdp1:
        rate *= calibration.attention_triton
    elif job.software is not Software.megatron:
        rate *= calibration.attention_second
    return flops * (1 + 512 / job.seq) / rate


def _elementwise_time(job: Job, is_moe: bool, calibration: Calibration) -> Seconds:
    """Return the seconds of norms, residuals, rotation, activation, routing and quantisation, both passes."""
    shapes, axes, h = job.shapes, job.axes, job.shapes.hidden
    whole = 1 / axes.tp if axes.sequence_parallel else 1.0
    qkv = (shapes.query_size + 2 * shapes.key_size) / axes.tp
    traffic = 52 * h * whole + 8 * qkv
    inputs = 2 * h + qkv + shapes.value_size / axes.tp
    wide = 2 if shapes.gated else 1
    extra = 0.0
    if is_moe and shapes.experts is not None:
        moe = shapes.experts
        routed = moe.top_k / axes.tp
        passes = 3.0 if shapes.biased_experts else 1.0  # bias, clamp and product are kernels of their own
        traffic += 8 * (wide + 1) * (passes * routed * moe.hidden + moe.shared_hidden / axes.tp)
        inputs += calibration.quantise_expert * routed * (h + (wide + 1) * moe.hidden)
        extra = calibration.moe_traffic * routed * h + 60 * moe.count * whole
        if "whole_graphs" in job.traits:
            extra *= calibration.moe_fused
        extra *= calibration.moe_yearly ** (2026.5 - min(job.released, 2026.5))
    else:
        traffic += 8 * (wide + 1) * shapes.ffn / axes.tp
        inputs += (wide + 1) * shapes.ffn / axes.tp
    fused = job.software is Software.megatron
    traffic *= calibration.elementwise if fused else calibration.elementwise_unfused
    if job.precision.is_quantised:
        traffic += 9 * calibration.quantise * inputs  # forward input and backward gradient: read 2, write 1 or 2
    return job.tokens * (traffic + extra) / (job.gpu.hbm * 1e9 * calibration.stream)


def _recomputed(
    job: Job, is_moe: bool, products: Seconds, attention: Seconds, elementwise: Seconds, waits: dict[str, Seconds]
) -> Seconds:
    """Return the seconds of forward work that the backward pass repeats."""
    if job.recomputes_all:
        return products + attention + elementwise + sum(waits.values()) / 2
    repeated = 0.0
    for kind in job.recompute:
        match kind:
            case "core_attn" | "selective":
                repeated += attention
            case "layernorm" | "norm":
                repeated += 0.25 * elementwise
            case "moe_act" | "act":
                repeated += 0.2 * elementwise
            case "mlp":
                repeated += 0.6 * products * (not is_moe) + 0.15 * products * is_moe
            case "moe":
                repeated += is_moe * (0.6 * products + 0.5 * elementwise + waits["ep"] / 2)
            case "mla_up_proj":
                repeated += 0.15 * products
            case _:
                pass
    return repeated


def _exposed(job: Job, axis: str, calibration: Calibration) -> float:
    """Return the share of a collective's time that no kernel hides."""
    if not job.overlapped or job.software in (Software.nanotron, Software.deepspeed):
        return 1.0
    if axis == "ep" and "ep_overlap" in job.traits:
        return calibration.ep_exposed_overlapped
    return float(getattr(calibration, f"{axis}_exposed"))


def exchange_time(job: Job, exchange: Exchange, calibration: Calibration) -> Seconds:
    """Return the seconds of a collective: bytes over each kind of link, and its messages."""
    gpu, local, share = job.gpu, calibration.nvlink, calibration.network
    if exchange.axis == "ep":
        local, share = calibration.all_to_all_nvlink, calibration.all_to_all_network
    elif job.software is Software.nanotron:
        share = calibration.network_nanotron
        if exchange.span > 256:
            share *= calibration.network_nanotron_wide
    inside = exchange.nvlink_bytes / (gpu.nvlink * 1e9 * local)
    across = exchange.network_bytes / (gpu.network * 1e9 * share)
    each = calibration.network_latency_s if exchange.network_bytes else calibration.latency_s
    return max(inside, across) + exchange.messages * each


def _host_time(job: Job, is_moe: bool, calibration: Calibration) -> Seconds:
    """Return the host's seconds to launch a layer's kernels, both passes."""
    if job.software is Software.nanotron:
        seconds = calibration.host_nanotron_s + (job.axes.tp > 1) * calibration.host_nanotron_tp_s
    else:
        seconds = calibration.host_layer_s
        if is_moe and not job.traits & {"whole_graphs", "token_drop"}:  # fixed shapes need no counts
            seconds += calibration.host_moe_s * (0.5 if "cuda_graphs" in job.traits else 1.0)
        if job.precision.is_quantised:
            seconds *= calibration.host_quantised
    return seconds * job.gpu.host * (4 / 3 if job.recomputes_all else 1)


def _split(job: Job, layers: Seconds, head: Seconds) -> ChunkTime:
    """Return a chunk's time as its two passes: 1 to 2, or 1 to 3 where all is recomputed."""
    share = 1 / 4 if job.recomputes_all else 1 / 3
    return ChunkTime(layers * share + head / 3, layers * (1 - share) + head * 2 / 3)


def expert_time(job: Job, layer: int, calibration: Calibration) -> Seconds:
    """Return the seconds of a layer that follow the routed tokens of a rank: the experts' products and the exchange.
    They are part of `layer_time`.
    """
    is_moe, exposed = job.shapes.is_moe[layer], 0.0
    if not is_moe:
        return 0.0
    products = sum(product_time(job, calibration, *shape) for shape in _expert_products(job))
    for exchange in layer_exchanges(job, is_moe):
        if exchange.axis == "ep":
            exposed += exchange_time(job, exchange, calibration) * _exposed(job, "ep", calibration)
    return products * (4 / 3 if job.recomputes_all else 1) + exposed


def head_time(job: Job, calibration: Calibration) -> Seconds:
    """Return the seconds of the head and the loss for one micro-batch. The head's product is in bf16."""
    local = job.shapes.vocab / job.axes.tp
    peak = job.gpu.bf16 * 1e12
    rate = peak * getattr(calibration, f"product_{job.gpu.generation.value}")
    rate *= job.gpu.power**calibration.power_exponent
    products = 6 * job.tokens * local * job.shapes.hidden / rate
    traffic = 24 * job.tokens * local / (job.gpu.hbm * 1e9 * calibration.stream)
    return products + traffic


def _send_time(job: Job, calibration: Calibration) -> Seconds:
    """Return the seconds between the end of a stage's pass and the start of the next one's."""
    axes, gpu = job.axes, job.gpu
    if axes.pp == 1:
        return 0.0
    size = 2 * job.tokens * job.shapes.hidden * (1 / axes.tp if axes.sequence_parallel else 1.0)
    base = calibration.nanotron_send_s if job.software is Software.nanotron else calibration.send_s
    link = gpu.nvlink * calibration.nvlink if axes.ranks <= gpu.domain else gpu.network * calibration.network
    return base + size / (link * 1e9)


def _data_time(job: Job, stage: PlanStage, backward: Seconds, calibration: Calibration) -> Seconds:
    """Return the seconds of gradient reduction and parameter gathering that a step waits for."""
    if job.sharding is Sharding.parameters:
        return 0.0
    total = sum(exchange_time(job, exchange, calibration) for exchange in state_exchanges(job, stage))
    if job.software is Software.nanotron and job.sharding is Sharding.optimizer:
        return total * calibration.nanotron_sharded  # reduced after the last backward pass
    if not job.overlapped:
        return total
    hidden = calibration.nanotron_dp_hidden if job.software is Software.nanotron else calibration.dp_hidden
    return max(total - hidden * backward, 0.15 * total)


def _gather_time(job: Job, stage: PlanStage, compute: Seconds, calibration: Calibration) -> Seconds:
    """Return the seconds per step that FSDP's gathers and reductions add to the micro-batches' work."""
    each = sum(exchange_time(job, exchange, calibration) for exchange in state_exchanges(job, stage))
    waits = max(0.0, each - compute) + calibration.fsdp_exposed * min(each, compute)
    return job.micro_batches * waits


def _optimizer_time(job: Job, stage: PlanStage, calibration: Calibration) -> Seconds:
    """Return the seconds of the update: 30 bytes per parameter of a shard, and the host's work of a step."""
    local = parameters(job, stage)
    data = 1 if job.sharding is Sharding.none else job.axes.dp * job.axes.cp
    expert_data = 1 if job.sharding is Sharding.none else job.axes.expert_dp
    held = local.dense / data + local.experts / expert_data
    fixed = calibration.host_nanotron_step_s if job.software is Software.nanotron else calibration.host_step_s
    traffic = 30 * held + 6 * local.total
    return traffic / (job.gpu.hbm * 1e9 * calibration.stream) + fixed * (1 + 0.1 * math.log2(job.axes.ranks))
