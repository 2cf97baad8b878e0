"""Memory of a rank: training state, activations in flight, logits and workspaces.

Sources of the formulas: Korthikanti et al. 2022 (2205.05198) for activations of a Transformer layer, Narayanan et al.
2021 (2104.04473) for micro-batches in flight. What each framework keeps was read in its code and checked against the
published figures: see docs/plan.md. T below is the tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from launch.plan.calibration import Calibration
from launch.plan.cluster import Generation
from launch.plan.stages import LocalParameters, PlanStage, parameters, split_layers
from launch.plan.workload import AttentionKernel, Job, ProductDtype, Sharding, Software

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of one stage at the step's peak, by component."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    """Gathered parameters, communication buffers and other temporary memory."""
    workspace: float
    """Workspaces of libraries, allocated once."""

    @property
    def static(self) -> float:
        """Bytes that stay allocated between steps."""
        return self.weights + self.gradients + self.optimizer + self.workspace

    @property
    def peak(self) -> float:
        return sum(getattr(self, one.name) for one in fields(self))


def stage_memories(job: Job, calibration: Calibration) -> list[StageMemory]:
    """Return the memory of a rank of each stage, first to last."""
    stages = split_layers(job)
    return [_stage_memory(job, stage, at, calibration) for at, stage in enumerate(stages)]


def peak_bytes(job: Job, calibration: Calibration) -> float:
    """Return the peak of the fullest rank."""
    return max(stage.peak for stage in stage_memories(job, calibration))


def state_bytes(job: Job, local: LocalParameters) -> tuple[float, float, float]:
    """Return the bytes of weights, gradients and optimizer state of one rank."""
    data = max(1, job.axes.dp * job.axes.cp // job.optimizer_shards)
    expert_data = max(1, job.axes.expert_dp // job.optimizer_shards)
    if job.sharding is Sharding.none:
        data = expert_data = 1

    def sharded(size: float) -> float:
        return size * (local.dense / data + local.experts / expert_data)

    whole = local.total
    match job.software:
        case Software.nanotron:
            # fp32 master weights, moments and accumulators, bf16 weights, bf16 gradients unless dp is 1
            if job.sharding is Sharding.none:
                return 2 * whole, (6 if job.axes.dp > 1 else 4) * whole, 12 * whole
            return 2 * whole, 8 * whole, sharded(14)
        case Software.megatron:
            match job.precision:
                case ProductDtype.fp32:
                    return 4 * whole, 4 * whole, sharded(8)
                case ProductDtype.fp16:
                    return 2 * whole, 2 * whole, sharded(16)
                case ProductDtype.bf16:
                    pass
            weights, gradients = 2 * whole, 4 * whole
            if "bf16_gradients" in job.traits:
                gradients = 2 * whole
            if job.sharding is Sharding.parameters:
                weights, gradients = sharded(2), sharded(4)
            return weights, gradients, sharded(8 if "bf16_moments" in job.traits else 12)
        case _:
            kept = {Sharding.parameters: 4, Sharding.gradients: 2, Sharding.optimizer: 0, Sharding.none: 0}
            master, small = 4, 2
            if job.sharding is Sharding.parameters:
                return sharded(kept[job.sharding]), sharded(4), sharded(8)
            gradients = sharded(small) if job.sharding is Sharding.gradients else small * whole
            return small * whole, gradients, sharded(master + 8)


def chunks_in_flight(job: Job, at: int) -> float:
    """Return the micro-batches whose activations stage `at` holds, as a number of passes of the whole stage."""
    pp, vpp, batches = job.axes.pp, job.axes.vpp, job.micro_batches
    if pp == 1:
        return 1
    if vpp == 1:
        return min(pp - at, batches)
    warm_up = 2 * (pp - at - 1) + (vpp - 1) * pp + 1
    return min(warm_up, batches * vpp) / vpp


def layer_activations(job: Job, layer: int, calibration: Calibration) -> dict[str, float]:
    """Return the bytes that a layer keeps for its backward pass per micro-batch, by module."""
    shapes, axes, h = job.shapes, job.axes, job.shapes.hidden
    size = 4 if job.precision is ProductDtype.fp32 else 2
    split = 1 / axes.tp
    whole = split if axes.sequence_parallel else 1.0
    found = {"layernorm": size * 2 * h * whole, "residual": size * 2 * h * whole}
    query, value, key = shapes.query_size, shapes.value_size, shapes.key_size
    found["core_attn"] = 4 * shapes.heads * split
    if job.attention is AttentionKernel.unfused:
        found["core_attn"] += (2 * size + 1) * shapes.heads * (job.seq / axes.cp) * split
    found["attention"] = size * (query + key + 2 * value if shapes.latent else query + 2 * key + value) * split
    if shapes.latent is not None:
        latent = shapes.latent
        found["latent"] = 2 * size * ((latent.query_rank or 0) + latent.key_rank) * whole + size * latent.rope_dim
    if shapes.dropout:
        found["dropout"] = 2 * h * whole
    wide = 3 if shapes.gated else 2
    if shapes.is_moe[layer] and shapes.experts is not None:
        moe = shapes.experts
        routed = moe.top_k * split
        found["dispatch"] = size * routed * axes.etp * h * calibration.dispatch_copies
        found["moe_fc1"] = size * routed * (wide - 1) * moe.hidden
        found["moe_act"] = size * routed * moe.hidden
        found["mlp"] = size * wide * moe.shared_hidden * split
        found["router"] = (8 * moe.count + 2 * h * calibration.router_copies) * whole
    else:
        found["mlp"] = size * wide * shapes.ffn * split
    return {name: job.tokens * value for name, value in found.items()}


_RECOMPUTED = {
    "selective": ("core_attn_scores",),
    "core_attn": ("core_attn_scores",),
    "layernorm": ("layernorm",),
    "norm": ("layernorm",),
    "moe_act": ("moe_act",),
    "act": ("moe_act",),
    "mlp": ("mlp",),
    "moe": ("dispatch", "moe_fc1", "moe_act", "router", "mlp"),
    "mla_up_proj": ("attention",),
}
"""Modules of `layer_activations` that each kind of recomputation drops."""


def kept_activations(job: Job, layer: int, calibration: Calibration) -> float:
    """Return the bytes of a layer that recomputation leaves."""
    found = layer_activations(job, layer, calibration)
    if job.recomputes_all:
        whole = 1 / job.axes.tp if job.axes.sequence_parallel else 1.0
        return 2 * job.tokens * job.shapes.hidden * whole
    total = sum(found.values())
    dropped = {name for kind in job.recompute for name in _RECOMPUTED.get(kind, ())}
    total -= sum(value for name, value in found.items() if name in dropped)
    if "core_attn_scores" in dropped:
        total -= found["core_attn"]
    return total


def _stage_memory(job: Job, stage: PlanStage, at: int, calibration: Calibration) -> StageMemory:
    shapes, axes = job.shapes, job.axes
    local = parameters(job, stage)
    weights, gradients, optimizer = state_bytes(job, local)
    activations = chunks_in_flight(job, at) * sum(kept_activations(job, layer, calibration) for layer in stage.layers)
    whole = 1 / axes.tp if axes.sequence_parallel else 1.0
    ends = job.tokens * shapes.hidden * whole
    activations += 4 * ends * stage.head + shapes.dropout * ends * stage.embedding
    logits = 0.0
    if stage.head:
        logits = calibration.logit_bytes(job) * job.tokens * shapes.vocab / axes.tp * (1 + shapes.mtp)
    buffers = sum(_buffers(job, stage, local, calibration))
    return StageMemory(weights, gradients, optimizer, activations, logits, buffers, _workspace(job))


def _buffers(job: Job, stage: PlanStage, local: LocalParameters, calibration: Calibration) -> Iterator[float]:
    """Yield temporary memory: one layer's recomputed activations, or a gathered unit of FSDP."""
    if job.recomputes_all and stage.layers and not stage.head:
        yield sum(layer_activations(job, stage.layers[-1], calibration).values())
    if job.sharding is Sharding.parameters and stage.layers:
        yield 2 * 2 * 2 * local.total / len(stage.layers)


def _workspace(job: Job) -> float:
    """Return the bytes of workspaces: cuBLAS, and Transformer Engine's own on Hopper and later."""
    if job.software is not Software.megatron:
        return 75e6
    if "local_layers" in job.traits:
        return 133e6
    return 71e6 if job.gpu.generation is Generation.ampere else 100e6
