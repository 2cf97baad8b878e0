"""Compute what a layout costs, in closed form: bytes that a rank keeps, and FLOPs and bytes of a layer's attention, and
bytes of its exchange of tokens.

Models are built on the meta device only, and no process group is needed. Tests compare bytes with those of real ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import assert_never

import torch

from model.config import LayerConfig, ModelConfig, WeightsOn
from model.roles import Role, registry
from parallel.deepspeed.config import Offload, ParameterOffload
from parallel.layout import (
    ContextMethod,
    DispatchMethod,
    EngineKind,
    GatherExperts,
    Layout,
    Recompute,
    Reduce,
    ReduceEvery,
    split_unit,
)
from parallel.mesh import meshes_of_rank
from parallel.parallelize import on_meta
from parallel.pipeline import runtime
from parallel.sharding import ShardSpec, shard_specs
from precision.config import PrecisionConfig

Bytes = int
Entries = Iterator[tuple[tuple[str, str], Bytes | Fraction]]


@dataclass(frozen=True)
class BatchShape:
    """One rank's batch in a step: `sequences` of `seq_len` tokens, `micro_batch_size` at a time. `aligned`: no document
    starts inside an attention chunk and reaches into the next. If False, assume such a document in every micro-batch.
    """

    sequences: int
    micro_batch_size: int
    seq_len: int
    aligned: bool = False


@dataclass(frozen=True)
class StaticBytes:
    """Bytes of a rank's training state. Gradients exist only from the backward pass to the update.

    `unreduced`: with several micro-batches, the whole gradients that a rank sums before FSDP2 reduces them to shards
    (`gradients`). 0 if they are reduced with every micro-batch. `gathered`: the parameters that stay gathered from the
    first micro-batch of a step to the last, in the dtype of the computation; those of one layer at a time come on top.
    """

    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    unreduced: Bytes = 0
    gathered: Bytes = 0


def static_bytes(
    model: ModelConfig,
    precision: PrecisionConfig,
    layout: Layout,
    moments: torch.dtype | None,
    rank: int = 0,
    muon: bool = False,
    frozen: AbstractSet[Role] = frozenset(),
) -> StaticBytes:
    """Return the bytes that `rank` keeps. Of the ranks of a pipeline stage, the first keeps the most. `moments`: the
    dtype of AdamW's two moments, or of the one moment that Muon has for matrices; None for SGD. `frozen`: roles without
    gradients and optimizer state. Under DeepSpeed, only bytes on the device count, without the padding of flat buffers.
    """
    meshes, here = meshes_of_rank(layout, rank), on_meta(model, precision)
    runtime.split_stages(here, meshes)
    specs = shard_specs(registry(here), model, meshes)
    if layout.engine is EngineKind.deepspeed:
        return _zero_bytes(specs, precision, layout, moments, frozen)
    kept = bytes_of_shards(specs, precision, moments, muon, frozen)
    summed, whole = _kept_whole(specs, layout)
    dtype = torch.bfloat16 if layout.reduce_dtype is Reduce.bfloat16 else precision.master_dtype
    trained = [spec for spec in summed if spec.info.role not in frozen]
    unreduced, gathered = (sum(spec.compute_block.numel for spec in some) for some in (trained, whole))
    return replace(kept, unreduced=unreduced * dtype.itemsize, gathered=gathered * precision.compute_dtype.itemsize)


def _kept_whole(specs: Mapping[str, ShardSpec], layout: Layout) -> tuple[list[ShardSpec], list[ShardSpec]]:
    """Return the parameters whose gradients FSDP2 reduces once per step, and those that it gathers once per step."""
    units = [spec for spec in specs.values() if spec.info.role is not Role.router and layout.world_size > 1]
    if layout.pp > 1:
        return units, units
    experts = [spec for spec in units if spec.info.role.is_expert and layout.gather_experts is GatherExperts.step]
    return (units if layout.reduce_every is ReduceEvery.step else experts), experts


def bytes_of_shards(
    specs: Mapping[str, ShardSpec],
    precision: PrecisionConfig,
    moments: torch.dtype | None,
    muon: bool = False,
    frozen: AbstractSet[Role] = frozenset(),
) -> StaticBytes:
    """Return the bytes that a rank with these shards keeps under FSDP2: see `static_bytes`."""
    trained = {name: spec for name, spec in specs.items() if spec.info.role not in frozen}
    elements, held = (sum(spec.local_block.numel for spec in some.values()) for some in (specs, trained))
    size = precision.master_dtype.itemsize
    optimizer, width = 0, 0 if moments is None else moments.itemsize
    for spec in trained.values() if width else ():
        if muon and spec.info.role.is_matrix:
            optimizer += width * spec.local_block.numel
        else:
            optimizer += 2 * width * spec.local_block.numel + 4  # plus a step count in float32
    return StaticBytes(size * elements, size * held, optimizer)


def _zero_bytes(
    specs: Mapping[str, ShardSpec],
    precision: PrecisionConfig,
    layout: Layout,
    moments: torch.dtype | None,
    frozen: AbstractSet[Role],
) -> StaticBytes:
    stage, here = layout.zero_stage, layout.zero.offload is Offload.none
    away = layout.zero.offload_parameters is not ParameterOffload.none
    master, parameters, gradients, optimizer = precision.master_dtype.itemsize, 0, 0, 0
    for spec in specs.values():
        whole = spec.compute_block.numel
        shard = -(-whole // (layout.efsdp if spec.info.role.is_expert else layout.fsdp))
        is_frozen = spec.info.role in frozen
        width = master if spec.info.role is Role.router or is_frozen else precision.compute_dtype.itemsize
        parameters += 0 if away else width * (shard if stage == 3 else whole)
        if is_frozen:
            continue
        gradients += master * (whole if stage == 1 else shard)
        if here:
            optimizer += shard * (master + (0 if moments is None else 2 * moments.itemsize))
    return StaticBytes(parameters, gradients, optimizer)


def attention_traffic(
    model: ModelConfig, layer: LayerConfig, precision: PrecisionConfig, layout: Layout, batch: BatchShape
) -> Entries:
    """Yield the bytes that one layer's attention hands to collectives of cp per micro-batch and rank, by purpose."""
    cp, again = layout.cp, layout.recompute.repeats_attention
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
class Copies:
    """Mean number of ranks, and of nodes, that a token is sent to. `nodes` matters under an exchange by node."""

    ranks: Fraction | float
    nodes: Fraction | float = 1


def copies_per_token(model: ModelConfig, layout: Layout) -> Copies:
    """Return the copies if each set of K experts is equally likely.

    None of the E / n experts of one of n groups is among a token's K with probability C(E - E / n, K) / C(E, K). Each
    slice of an expert (etp) is on a rank of its own.
    """

    def groups(count: int) -> float:
        experts, top_k = model.num_experts, model.router.top_k
        return count * (1 - math.comb(experts - experts // count, top_k) / math.comb(experts, top_k))

    return Copies(layout.etp * groups(layout.ep), groups(layout.exchange_nodes))


def expert_traffic(
    model: ModelConfig, precision: PrecisionConfig, layout: Layout, tokens: int, copies: Copies | None = None
) -> Entries:
    """Yield the bytes that one MoE layer's dispatch and combine hand to collectives per micro-batch of `tokens` on this
    rank, by purpose. `copies`: None for `copies_per_token`.
    """
    ranks, top_k, size = layout.ep * layout.etp, model.router.top_k, precision.compute_dtype.itemsize
    if ranks == 1:
        return
    wide, chosen, again = max(4, size), top_k * layout.etp, layout.recompute is Recompute.full
    gathered, by_node = layout.dispatch is DispatchMethod.all_gather, layout.exchange_nodes > 1 and chosen > 1
    by_slot = top_k == 1 and not by_node
    # the combine is recomputed only if an operation after it saves tensors for the backward pass
    weighted_here = model.router.weights_on is WeightsOn.output and by_slot and not gathered
    back_again = again and weighted_here
    if gathered:
        there = tokens * model.hidden_size * size
        back = ranks * there
        yield ("experts", "tokens"), 2 * (there + back) + again * there + back_again * back
        yield ("experts", "ids"), (1 + again) * tokens * chosen * 8
        yield ("experts", "weights"), (1 + again + ranks) * tokens * chosen * wide
        return
    copies = copies or copies_per_token(model, layout)
    hops = {"": copies.nodes, " inside nodes": copies.ranks} if by_node else {"": copies.ranks}
    numbers = model.num_experts * layout.etp + (0 if by_slot else 2 * ranks if by_node else ranks)
    yield ("experts", "counts"), (1 + again) * numbers * 8
    for where, times in hops.items():
        sent = Fraction(times) * tokens
        yield ("experts", f"tokens{where}"), (4 + again + back_again) * sent * model.hidden_size * size
        if not by_slot:
            yield ("experts", f"ids{where}"), (1 + again) * sent * chosen * 4
            yield ("experts", f"weights{where}"), (2 + again) * sent * chosen * wide


@dataclass(frozen=True)
class AttentionCost:
    """Cost per rank of a forward and a backward pass of one layer's attention, without its projections, over a sequence
    that is a single document.

    `flops` follow the convention of model/flops.py. `keys`: bytes of the keys and values of a rank's positions. `kept`:
    bytes kept from the forward to the backward pass. `sent`: bytes handed to collectives. All are means over ranks.
    """

    flops: float
    keys: Bytes
    kept: Bytes
    sent: Bytes


def attention_cost(
    model: ModelConfig, layer: LayerConfig, precision: PrecisionConfig, layout: Layout, seq_len: int
) -> AttentionCost:
    """Return the cost. No chunk of a single document crosses a border between ranks, so no halo is sent."""
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
