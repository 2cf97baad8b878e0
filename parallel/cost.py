"""What a layout costs, in closed form: bytes handed to collectives per step, and bytes that a rank keeps.

Nothing is built and no process group is needed. `parallel.mesh.Traffic` counts the same on real ranks. Tests compare
the two to the byte.

Shapes: B sequences of a micro-batch, T sequence length, D hidden size, K experts per token, S slots (a rank's tokens *
K * etp).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

import torch

from model.config import AuxScope, FeedForward, LayerConfig, ModelConfig, QKNorm, WeightsOn
from model.load_balance import RouterSums
from model.roles import Role, registry
from parallel import whole_matrices as whole
from parallel.deepspeed.config import Offload, ParameterOffload
from parallel.layout import ContextMethod, DispatchMethod, EngineKind, Layout, Recompute, Reduce, split_unit
from parallel.mesh import meshes_of_rank
from parallel.parallelize import on_meta
from parallel.pipeline import runtime
from parallel.sharding import ShardSpec, shard_specs
from precision.config import PrecisionConfig

Bytes = int
Traffic = dict[tuple[str, str], Bytes]
Entries = Iterator[tuple[tuple[str, str], Bytes | Fraction]]


@dataclass(frozen=True)
class BatchShape:
    """One step of one rank: `sequences` of `seq_len` tokens, `micro_batch_size` at a time. `aligned`: no document
    starts inside an attention chunk and reaches into the next; otherwise one does in every micro-batch.
    """

    sequences: int
    micro_batch_size: int
    seq_len: int
    aligned: bool = False


@dataclass(frozen=True)
class StaticBytes:
    """Bytes that a rank keeps from step to step. Gradients exist from the backward pass to the update."""

    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes


def static_bytes(
    model: ModelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    moments: torch.dtype | None,
    rank: int = 0,
    muon: bool = False,
) -> StaticBytes:
    """Bytes that this rank keeps; rank 0 keeps the most. `moments`: the format of AdamW's two moments, or of the one
    that Muon has for matrices; None for SGD. Under DeepSpeed: bytes on the device, without the padding of its flat
    buffers.
    """
    specs = _specs(model, precision, layout, rank)
    if layout.engine is EngineKind.deepspeed:
        return _zero_bytes(specs, precision, layout, moments)
    elements, size = sum(spec.local_block.numel for spec in specs.values()), precision.master_dtype.itemsize
    optimizer, width = 0, 0 if moments is None else moments.itemsize
    for spec in specs.values() if width else ():
        if muon and spec.info.role.is_matrix:
            optimizer += width * spec.local_block.numel
        else:
            optimizer += 2 * width * spec.local_block.numel + 4  # and a step count, float32
    return StaticBytes(size * elements, size * elements, optimizer)


def _zero_bytes(
    specs: Mapping[str, ShardSpec], precision: PrecisionConfig, layout: Layout, moments: torch.dtype | None
) -> StaticBytes:
    stage, here = layout.zero_stage, layout.zero.offload is Offload.none
    away = layout.zero.offload_parameters is not ParameterOffload.none
    master, parameters, gradients, optimizer = precision.master_dtype.itemsize, 0, 0, 0
    for spec in specs.values():
        whole = spec.compute_block.numel
        shard = -(-whole // (layout.efsdp if spec.info.role.is_expert else layout.fsdp))
        width = master if spec.info.role is Role.router else precision.compute_dtype.itemsize
        parameters += 0 if away else width * (shard if stage == 3 else whole)
        gradients += master * (whole if stage == 1 else shard)
        if here:
            optimizer += shard * (master + (0 if moments is None else 2 * moments.itemsize))
    return StaticBytes(parameters, gradients, optimizer)


def step_traffic(
    model: ModelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    batch: BatchShape,
    matrices: torch.dtype | None = None,
) -> Traffic:
    """Bytes handed to collectives in one optimizer step, over all ranks of the world, by axis and purpose.

    The sum over ranks, because routing decides how much each sends to the experts; everything else is the same on every
    rank. All micro-batches must be full. `matrices`: the format in which Muon's matrices are sent, None without Muon.
    """
    found: Counter[tuple[str, str]] = Counter()
    world, micro_batches = layout.world_size, batch.sequences // batch.micro_batch_size
    if world == 1:
        return {}
    stage, reductions = world // layout.pp, 1 if layout.pp > 1 else micro_batches
    counted = (
        *((stage * micro_batches, technique(model, precision, layout, batch)) for technique in _PER_MICRO_BATCH),
        (stage * reductions, _data(model, precision, layout)),
        (1, _once(model, precision, layout)),
        (1, _matrices(model, precision, layout, matrices)),
    )
    for times, entries in counted:
        for key, size in entries:
            found[key] += int(times * size)
    return {key: size for key, size in found.items() if size}


def _specs(model: ModelConfig, precision: PrecisionConfig, layout: Layout, rank: int) -> dict[str, ShardSpec]:
    meshes, here = meshes_of_rank(layout, rank), on_meta(model, precision)
    runtime.split_stages(here, meshes)
    return shard_specs(registry(here), model, meshes)


def _all_specs(model: ModelConfig, precision: PrecisionConfig, layout: Layout) -> dict[str, ShardSpec]:
    """The specs of all parameters, each on the first rank of its stage."""
    return shard_specs(registry(on_meta(model, precision)), model, meshes_of_rank(layout, 0))


def _data(model: ModelConfig, precision: PrecisionConfig, layout: Layout) -> Entries:
    """FSDP2 of one micro-batch on a rank of each stage. Layers gather their parameters for the forward pass and again
    for the backward pass; the other parameters (the root) stay gathered in between. Gradients are reduced after each
    micro-batch. In a pipeline everything is gathered and reduced once per step.
    """
    narrow = precision.compute_dtype is torch.bfloat16
    reduced = 2 if layout.reduce_dtype is Reduce.bfloat16 else precision.master_dtype.itemsize
    for name, spec in _all_specs(model, precision, layout).items():
        stages = 1 + any(axis.name == "ends" for axis in spec.replicas)  # tied embeddings are on both ends
        axis, master = spec.fsdp_split.axis, narrow and spec.info.role is Role.router
        size = precision.master_dtype.itemsize if master else precision.compute_dtype.itemsize
        gathers = 2 if name.startswith("layers.") and layout.pp == 1 else 1
        elements = spec.local_block.numel  # of rank 0, whose shard is full: shorter ones are padded to it
        if axis.size > 1:
            yield (axis.name, "parameters"), stages * gathers * size * elements
            yield (axis.name, "gradients"), stages * reduced * elements * axis.size
        if layout.dp_replicate > 1:
            yield ("dp_replicate", "gradients"), stages * reduced * elements


def _pipeline(model: ModelConfig, precision: PrecisionConfig, layout: Layout, batch: BatchShape) -> Entries:
    """What one micro-batch sends from stage to stage, and its gradient back. Stages on one rank send nothing."""
    owners = layout.stages(model).owners
    hops = sum(one != other for one, other in itertools.pairwise(owners))
    tokens = batch.micro_batch_size * batch.seq_len // (layout.cp * layout.tp)
    for purpose in ("activations", "gradients"):
        yield ("pp", purpose), hops * tokens * model.hidden_size * precision.compute_dtype.itemsize


def _tensor(model: ModelConfig, precision: PrecisionConfig, layout: Layout, batch: BatchShape) -> Entries:
    """Tensor parallelism of one micro-batch on one rank of each stage."""
    if layout.tp == 1:
        return
    tokens = batch.micro_batch_size * batch.seq_len // layout.cp
    wide = max(4, precision.compute_dtype.itemsize)
    part = tokens // layout.tp * model.hidden_size * precision.compute_dtype.itemsize
    whole, key = part * layout.tp, ("tp", "activations")
    yield key, whole + part  # embedding: scattered, its gradient gathered
    yield key, part + whole  # head: gathered, its gradient scattered
    yield ("tp", "loss"), 3 * tokens * wide  # maximum; sum of exponentials and the label's logit
    again, layer_again = layout.recompute is not Recompute.none, layout.recompute is Recompute.full
    for layer in model.blocks:
        yield key, 2 * (part + whole) + again * part + layer_again * whole  # attention
        if layer.qk_norm is QKNorm.full:
            yield key, (2 + again) * 2 * tokens * wide  # sums of squares of queries and keys
        if layer.feed_forward is not FeedForward.moe or model.shared_hidden_size:
            yield key, 2 * (part + whole) + again * part  # the last operation of a layer is not recomputed
        if _balances_sequences(model, layer):
            yield ("tp", "balance"), batch.micro_batch_size * model.num_experts * 8


def _context(model: ModelConfig, precision: PrecisionConfig, layout: Layout, batch: BatchShape) -> Entries:
    """Context parallelism of one micro-batch on one rank, the mean over ranks."""
    if layout.cp == 1:
        return
    for layer in model.blocks:
        yield from attention_traffic(model, layer, precision, layout, batch)
        if _balances_sequences(model, layer):
            yield ("cp", "balance"), batch.micro_batch_size * model.num_experts * 8


def attention_traffic(
    model: ModelConfig, layer: LayerConfig, precision: PrecisionConfig, layout: Layout, batch: BatchShape
) -> Entries:
    """What one layer's attention hands to collectives of cp in one micro-batch on one rank, the mean over ranks."""
    cp, again = layout.cp, layout.recompute is not Recompute.none
    size, wide = precision.compute_dtype.itemsize, max(4, precision.compute_dtype.itemsize)
    heads, shared = (
        n // layout.tp * model.head_dim * batch.micro_batch_size for n in (model.num_heads, model.num_kv_heads)
    )
    part = batch.seq_len // cp
    tails = part // split_unit(model, batch.seq_len) > 1
    if cp == 1:
        return
    if layer.attention_chunk_size is not None and layer.attention_chunk_size < batch.seq_len:
        if not batch.aligned:  # a chunk of keys and values across each border between two ranks, and its gradient
            borders = (cp - 1) * (1 + tails)
            yield ("cp", "halo"), Fraction((2 + again) * borders * 2 * layer.attention_chunk_size * shared * size, cp)
        return
    match layout.cp_method:
        case ContextMethod.gather:
            yield ("cp", "keys and values"), (1 + again + cp) * 2 * part * shared * size
        case ContextMethod.ulysses:
            yield ("cp", "heads"), (2 + again) * part * (2 * heads + 2 * shared) * size
        case ContextMethod.ring:
            yield ("cp", "ring"), (cp - 1) * 2 * part * shared * ((2 + again) * size + wide)
        case _:
            assert_never(layout.cp_method)


@dataclass(frozen=True)
class AttentionCost:
    """A forward and a backward pass of one layer's attention between its projections, over one sequence of one
    document, on one rank.

    `flops` by the convention of model/flops.py. `keys`: bytes of the keys and values of this rank's part. `kept`: bytes
    kept from the forward to the backward pass. `sent`: bytes handed to collectives. The mean where ranks differ.
    """

    flops: float
    keys: Bytes
    kept: Bytes
    sent: Bytes


def attention_cost(
    model: ModelConfig, layer: LayerConfig, precision: PrecisionConfig, layout: Layout, seq_len: int
) -> AttentionCost:
    """The cost without a halo: one document's chunks are those of the sequence."""
    size, wide = precision.compute_dtype.itemsize, max(4, precision.compute_dtype.itemsize)
    part, heads, shared = seq_len // layout.cp, model.num_heads // layout.tp, model.num_kv_heads // layout.tp
    reach = min(seq_len, layer.attention_chunk_size or seq_len)
    pairs = part * (reach + 1) / 2
    keys = 2 * part * shared * model.head_dim * size
    whole_keys = layout.cp_method is ContextMethod.gather and reach == seq_len
    kept = 2 * part * heads * model.head_dim * size + keys * (layout.cp if whole_keys else 1)
    batch = BatchShape(1, 1, seq_len, aligned=True)
    sent = sum(size for _, size in attention_traffic(model, layer, precision, layout, batch))
    return AttentionCost(
        flops=3 * 4 * pairs * heads * model.head_dim,
        keys=keys,
        kept=kept + part * heads * wide,
        sent=int(sent),
    )


def _balances_sequences(model: ModelConfig, layer: LayerConfig) -> bool:
    """Whether a layer's backward pass needs the token counts of whole sequences."""
    return (
        layer.feed_forward is FeedForward.moe
        and bool(model.balance.aux)
        and model.balance.aux_scope is not AuxScope.whole
    )


def _experts(model: ModelConfig, precision: PrecisionConfig, layout: Layout, batch: BatchShape) -> Entries:
    """Expert parallelism of one micro-batch on one rank of each stage, the mean over ranks."""
    ranks = layout.ep * layout.etp
    if ranks == 1:
        return
    tokens = batch.micro_batch_size * batch.seq_len // (layout.cp * layout.tp)
    slots = tokens * model.router.top_k * layout.etp
    size, wide = precision.compute_dtype.itemsize, max(4, precision.compute_dtype.itemsize)
    again = layout.recompute is Recompute.full
    # a layer ends with the combine, unless something after it keeps its input
    weighted_here = model.router.weights_on is WeightsOn.output and layout.dispatch is not DispatchMethod.all_gather
    back_again = again and bool(model.shared_hidden_size or weighted_here)
    for _ in range(sum(layer.feed_forward is FeedForward.moe for layer in model.blocks)):
        match layout.dispatch:
            case DispatchMethod.all_gather:
                there = tokens * model.hidden_size * size
                back = ranks * there
                yield ("experts", "tokens"), 2 * (there + back) + again * there + back_again * back
                yield ("experts", "counts"), (1 + again) * slots * 8
                yield ("experts", "weights"), (1 + again) * slots * wide + ranks * slots * wide
            case DispatchMethod.all_to_all | DispatchMethod.deepep:  # an upper bound for DeepEP
                yield ("experts", "tokens"), (4 + again + back_again) * slots * model.hidden_size * size
                yield ("experts", "counts"), (1 + again) * model.num_experts * layout.etp * 8
            case _:
                assert_never(layout.dispatch)


_PER_MICRO_BATCH = (_tensor, _context, _experts, _pipeline)


def _once(model: ModelConfig, precision: PrecisionConfig, layout: Layout) -> Entries:
    """Once per step, all ranks together."""
    world, layers = layout.world_size, sum(layer.feed_forward is FeedForward.moe for layer in model.blocks)
    yield ("world", "loss"), world * (8 + 8)  # the number of labels, the loss
    yield ("world", "norm"), world * 8
    yield ("world", "balance"), world * layers * 8 * (model.num_experts + len(RouterSums._fields))
    for spec in _all_specs(model, precision, layout).values():
        for axis in spec.partial:
            copies = world // layout.pp // layout.fsdp * (2 if axis.name == "ends" else 1)
            yield (axis.name, "gradients"), spec.compute_block.numel * precision.master_dtype.itemsize * copies


def _matrices(model: ModelConfig, precision: PrecisionConfig, layout: Layout, sent: torch.dtype | None) -> Entries:
    """Muon's matrices, once per step, all ranks together: along each split the ranks hand over their shards, which make
    up every matrix once, and the results.
    """
    if sent is None:
        return
    meshes = meshes_of_rank(layout, 0)
    for spec in _all_specs(model, precision, layout).values():
        if spec.info.role.is_matrix:
            everywhere = math.prod(spec.info.shape) * math.prod(axis.size for axis in spec.replicas)
            for split in whole.matrix_splits(spec, meshes):
                yield (split.axis.name, whole.PURPOSE), 2 * everywhere * sent.itemsize
