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
            if "fp8_copies" in job.traits:  # of weights, by rows and by columns
                weights += 2 * whole
            if "bf16_gradients" in job.traits:
                gradients = 2 * whole
            if job.sharding is Sharding.parameters:
                weights, gradients = sharded(2), sharded(4)
            return weights, gradients, sharded(6 if "low_precision_optimizer" in job.traits else 12)
        case _:
            kept = {Sharding.parameters: 4, Sharding.gradients: 2, Sharding.optimizer: 0, Sharding.none: 0}
            master, small = 4, 2
            if job.sharding is Sharding.parameters:
                return sharded(kept[job.sharding]), sharded(4), sharded(8)
            gradients = sharded(small) if job.sharding is Sharding.gradients else small * whole
            return small * whole, gradients, sharded(master + 8)


def passes_in_flight(job: Job, at: int) -> list[float]:
    """Return how many micro-batches stage `at` holds activations of at the peak, for each of its model chunks.

    1F1B holds one per later stage, and its own. Interleaved 1F1B first runs `pp` micro-batches through a chunk, then
    through the next.
    """
    pp, vpp, batches = job.axes.pp, job.axes.vpp, job.micro_batches
    if vpp == 1:
        return [min(pp - at, batches)]
    warm_up = min(2 * (pp - at - 1) + (vpp - 1) * pp + 1, batches * vpp)
    held = [0.0] * vpp
    for step in range(warm_up):
        held[step // pp % vpp] += 1
    return held


def layer_activations(job: Job, layer: int, calibration: Calibration) -> dict[str, float]:
    """Return the bytes that a layer keeps for its backward pass per micro-batch, by module."""
    shapes, axes, h = job.shapes, job.axes, job.shapes.hidden
    size = 4 if job.precision is ProductDtype.fp32 else 2
    quantised = 1 if "fp8_activations" in job.traits else size  # inputs of products
    split = 1 / axes.tp
    whole = split if axes.sequence_parallel else 1.0
    encoded = shapes.encoder is not None and layer < shapes.encoder.layers
    seq, tokens = job.seq, job.tokens
    if shapes.encoder is not None and encoded:
        seq, tokens = shapes.encoder.seq, job.mbs * shapes.encoder.seq // axes.cp
    found = {"layernorm": quantised * 2 * h * whole, "residual": size * 2 * h * whole}
    query, value, key = shapes.query_size, shapes.value_size, shapes.key_size
    found["core_attn"] = 4 * shapes.heads * split
    if job.attention is AttentionKernel.unfused:
        found["core_attn"] += (2 * size + 1) * shapes.heads * (seq / axes.cp) * split
    found["attention"] = size * (query + key + 2 * value if shapes.latent else query + 2 * key + value) * split
    if shapes.latent is not None:
        latent = shapes.latent
        found["latent"] = 2 * size * ((latent.query_rank or 0) + latent.key_rank) * whole + size * latent.rope_dim
    if shapes.dropout:
        found["dropout"] = 2 * h * whole
    if shapes.encoder is not None and not encoded:
        found["cross_attn"] = 5 * h * whole + 2 * size * h * split
        found["cross_attn"] += 2 * size * key * split * shapes.encoder.seq / job.seq
        if job.attention is AttentionKernel.unfused:
            found["cross_attn"] += (2 * size + 1) * shapes.heads * shapes.encoder.seq * split
    wide = 2 if shapes.gated else 1
    if shapes.is_moe[layer] and shapes.experts is not None:
        moe = shapes.experts
        routed = moe.top_k * split * (1 if job.forced_balance else calibration.imbalance)
        found["dispatch"] = quantised * routed * axes.etp * h
        found["moe_fc1"] = size * routed * wide * moe.hidden
        found["moe_act"] = quantised * routed * moe.hidden
        found["mlp"] = (size * wide + quantised) * moe.shared_hidden * split
        found["router"] = (8 * moe.count + 2 * h) * whole
    else:
        found["mlp"] = (size * wide + quantised) * shapes.ffn * split
    return {name: tokens * value for name, value in found.items()}


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
    if job.software is Software.fsdp2 and "selective" in job.recompute:
        return _half_of_products(job, found)
    dropped = {name for kind in job.recompute for name in _RECOMPUTED.get(kind, ())}
    total -= sum(value for name, value in found.items() if name in dropped)
    if "core_attn_scores" in dropped:
        total -= found["core_attn"]
    return total


def _half_of_products(job: Job, found: dict[str, float]) -> float:
    """Return what torchtitan's selective checkpointing keeps: a layer's input, the attention, and the result of every
    second product.
    """
    shapes, whole = job.shapes, 2 * job.tokens * job.shapes.hidden
    products = sum(found.get(name, 0.0) for name in ("attention", "mlp", "moe_fc1", "moe_act", "dispatch"))
    return whole + found["core_attn"] + 2 * job.tokens * shapes.value_size / job.axes.tp + (products + whole) / 2


def _nanotron_memory(job: Job, stage: PlanStage, at: int, calibration: Calibration) -> StageMemory:
    """Return what nanotron's allocator reserves. Its layers are not fused, so what they keep is fitted: bytes for each
    hidden element and each element of the MLP.
    """
    shapes, axes, tokens = job.shapes, job.axes, job.tokens
    local = parameters(job, stage)
    weights, gradients, optimizer = state_bytes(job, local)
    layer = calibration.nanotron_hidden_bytes * shapes.hidden + calibration.nanotron_ffn_bytes * shapes.ffn
    held = sum(n * len(chunk) for n, chunk in zip(passes_in_flight(job, at), stage.chunks, strict=True))
    logits = stage.head * calibration.nanotron_logit_bytes * tokens * shapes.vocab / axes.tp
    buffers = calibration.nanotron_gathered_bytes * tokens * shapes.hidden
    buffers += calibration.nanotron_layer_bytes * tokens * (shapes.hidden + shapes.ffn) / axes.tp
    if job.sharding is Sharding.none:
        buffers += calibration.nanotron_bucket_bytes * local.total
    activations = held * layer * tokens / axes.tp
    return StageMemory(weights, gradients, optimizer, activations, logits, buffers, _workspace(job, calibration))


def _stage_memory(job: Job, stage: PlanStage, at: int, calibration: Calibration) -> StageMemory:
    if job.software is Software.nanotron:
        return _nanotron_memory(job, stage, at, calibration)
    shapes, axes = job.shapes, job.axes
    local = parameters(job, stage)
    weights, gradients, optimizer = state_bytes(job, local)
    activations = sum(
        passes * sum(kept_activations(job, layer, calibration) for layer in chunk)
        for passes, chunk in zip(passes_in_flight(job, at), stage.chunks, strict=True)
    )
    whole = 1 / axes.tp if axes.sequence_parallel else 1.0
    ends = job.tokens * shapes.hidden * whole
    activations += 4 * ends * stage.head + shapes.dropout * ends * stage.embedding
    logits = 0.0
    if stage.head:
        bytes_each = calibration.logit_bytes(job) + 4.6 * ("deferred_head_gradient" in job.traits)
        logits = bytes_each * job.tokens * shapes.vocab / axes.tp * (1 + shapes.mtp)
    buffers = sum(_buffers(job, stage, local, calibration))
    return StageMemory(weights, gradients, optimizer, activations, logits, buffers, _workspace(job, calibration))


def _buffers(job: Job, stage: PlanStage, local: LocalParameters, calibration: Calibration) -> Iterator[float]:
    """Yield temporary memory: one layer's recomputed activations, or a gathered unit of FSDP."""
    if job.recomputes_all and stage.layers and not stage.head:
        yield sum(layer_activations(job, stage.layers[-1], calibration).values())
    if "fused_accumulation" in job.traits and stage.layers:
        yield _stand_in_gradients(job, stage)
    if job.sharding is Sharding.parameters and stage.layers:
        yield 2 * 2 * 2 * local.total / len(stage.layers)


def _stand_in_gradients(job: Job, stage: PlanStage) -> float:
    """Return the bytes of the bf16 tensors that autograd gets in place of gradients, which the products have added into
    the fp32 ones. Transformer Engine keeps one for each shape of weights.
    """
    shapes, axes = job.shapes, job.axes
    kinds = {shapes.is_moe[layer] for layer in stage.layers}
    size = shapes.attention_parameters / axes.tp + stage.head * shapes.vocab * shapes.hidden / axes.tp
    if False in kinds:
        size += shapes.dense_parameters / axes.tp
    if True in kinds:
        size += shapes.shared_parameters / axes.tp + shapes.expert_parameters / axes.etp
    return 2 * size


def _workspace(job: Job, calibration: Calibration) -> float:
    """Return the bytes of workspaces: those of cuBLAS, by torch and by Transformer Engine, and small tables."""
    if job.software is Software.nanotron:  # tables of the rotation, and the buffers that tp gathers into
        gathered = 2 * 2 * job.tokens * job.shapes.hidden if job.axes.tp > 1 else 0
        return calibration.nanotron_base_mib * MIB + gathered
    if job.software is not Software.megatron:
        return calibration.base_mib * MIB
    ampere = job.gpu.generation is Generation.ampere
    ours = 8.1 if "free_workspace" in job.traits and job.gpu.generation is not Generation.hopper else 32
    if "local_layers" in job.traits:
        return (calibration.base_mib + ours + 8 + 65 / job.axes.tp) * MIB
    streams = 5 if "grouped_products" in job.traits else 1
    return (calibration.base_mib + ours + streams * (4 if ampere else 32)) * MIB
