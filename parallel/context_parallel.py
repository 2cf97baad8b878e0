"""Context parallelism: each rank of the axis holds a part of every sequence.

Sequences are split only between attention chunks. Since later queries attend to more keys, a rank has some chunks from
the head of the sequence and as many, or one fewer, from its tail. Ranks do equal work if each has an even number of
chunks, else as equal as whole chunks allow. A chunked layer needs keys from other ranks only if documents start inside
a chunk and reach into the next. Layers with full attention get the keys of other ranks by a `ContextMethod`.

Shapes: B batch, T sequence, L this rank's part of it, H query heads, G key/value heads, K head size, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from model.attention.layer import attend
from model.attention.plan import AttentionPlan, ForwardContext, on_grid
from model.attention.segments import (
    AttentionGradients,
    DocumentBounds,
    PartialAttention,
    Segment,
    SegmentRun,
    attend_segments,
    document_bounds,
    plan_segments,
)
from model.transformer import Layer, Transformer
from parallel.comm.collectives import all_gather, all_to_all, ring_shift
from parallel.layout import ContextMethod
from parallel.mesh import MeshAxis


def apply(model: Transformer, axis: MeshAxis) -> None:
    """Make every attention layer attend to keys on other ranks too, by the `ContextMethod` of the shard."""
    if axis.size > 1:
        for layer in model.layers.values():
            assert isinstance(layer, Layer)
            layer.attention.attend = attend_shard


@dataclass(frozen=True)
class ContextShard:
    """This rank's part of any sequence of `length` tokens. Sequences are split at multiples of `unit` tokens."""

    axis: MeshAxis
    length: int
    unit: int
    method: ContextMethod

    def runs(self, rank: int) -> list[SegmentRun]:
        """Return the positions of a rank, as one or two runs. Of its m units, ceil(m/2) are from the head of the
        sequence, in the order of the ranks, and the others from its tail, in the reverse order.
        """
        units = self.length // self.unit // self.axis.size
        head, tail = -(-units // 2) * self.unit, units // 2 * self.unit
        found = [SegmentRun(rank * head, (rank + 1) * head, 0)]
        if tail:
            found.append(SegmentRun(self.length - (rank + 1) * tail, self.length - rank * tail, head))
        return found

    def with_halo(self, rank: int) -> list[SegmentRun]:
        """Return those runs of a rank whose first position follows a position on another rank."""
        runs, last = self.runs(rank), self.axis.size - 1
        return [*(runs[:1] if rank > 0 else []), *(runs[1:] if rank < last else [])]

    @cached_property
    def columns(self) -> Tensor:
        """This rank's positions, on the host: int64 [L], ascending."""
        return torch.cat([torch.arange(run.start, run.stop) for run in self.runs(self.axis.rank)])

    @property
    def head(self) -> int:
        """The number of this rank's positions that are from the head of the sequence."""
        return self.runs(0)[0].stop

    def take(self, x_BT: Tensor) -> Tensor:
        return x_BT if self.axis.size == 1 else x_BT.index_select(1, self.columns.to(x_BT.device))

    def unshard(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Concatenate the ranks' parts in the order of the sequence."""
        heads = [part.narrow(dim, 0, self.head) for part in parts]
        tails = [part.narrow(dim, self.head, part.shape[dim] - self.head) for part in reversed(parts)]
        return torch.cat(heads + tails, dim)

    def shards(self, x: Tensor, dim: int) -> list[Tensor]:
        """Return each rank's part of a whole tensor: the inverse of `unshard`."""
        return [
            torch.cat([x.narrow(dim, run.start, run.stop - run.start) for run in self.runs(rank)], dim)
            for rank in range(self.axis.size)
        ]

    def sequence_context(
        self, positions_BT: Tensor, device: torch.device, routed_tokens: float | None = None
    ) -> ForwardContext:
        """Return the `ForwardContext` for this rank's positions, made from the positions of whole sequences."""
        if self.axis.size == 1:
            return ForwardContext(positions_BT, device, routed_tokens)
        return ShardedContext(self, positions_BT, device, routed_tokens)


@dataclass(frozen=True)
class RingPlan(AttentionPlan):
    """A plan in which keys arrive rank by rank. `rounds[i]`: the segments whose keys are from the i-th rank before this
    one in the ring; `rounds[0]` uses this rank's own keys.
    """

    rounds: tuple[list[Segment], ...] = ()


class ShardedContext(ForwardContext):
    """The context for this rank's positions. All ranks know the whole sequences, so they plan the same exchanges."""

    def __init__(
        self, shard: ContextShard, positions_BT: Tensor, device: torch.device, routed_tokens: float | None = None
    ) -> None:
        self.shard, self._whole_BT = shard, positions_BT.cpu()
        super().__init__(shard.take(self._whole_BT), device, routed_tokens)

    def _make_plan(self, chunk: int | None) -> AttentionPlan:
        shard = self.shard
        if chunk is None or chunk >= shard.length:
            return self._full_plan(document_bounds(self._whole_BT == 0))
        starts_BT, own = self._whole_BT % chunk == 0, shard.runs(shard.axis.rank)
        if bool((starts_BT == on_grid(shard.length, chunk)).all()):
            return AttentionPlan(block=chunk)
        keys, halo = list(own), not bool(starts_BT[:, ::chunk].all())
        if halo:  # a chunk of a document is at most one block long, so one previous block is enough
            at = own[-1].at + own[-1].stop - own[-1].start
            for run in shard.with_halo(shard.axis.rank):
                keys.append(SegmentRun(run.start - chunk, run.start, at))
                at += chunk
        return AttentionPlan(block=chunk, halo=halo, segments=plan_segments(document_bounds(starts_BT), own, keys))

    def _full_plan(self, rows: DocumentBounds) -> AttentionPlan:
        shard, rank, size = self.shard, self.shard.axis.rank, self.shard.axis.size
        own, whole = shard.runs(rank), [SegmentRun(0, shard.length, 0)]
        match shard.method:
            case ContextMethod.ulysses:
                return AttentionPlan(segments=plan_segments(rows, whole, whole))
            case ContextMethod.gather:
                return AttentionPlan(segments=plan_segments(rows, own, whole))
            case ContextMethod.ring:
                turns = (shard.runs((rank - turn) % size) for turn in range(size))
                return RingPlan(rounds=tuple(plan_segments(rows, own, keys) for keys in turns))


def attend_shard(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, context: ForwardContext, chunk: int | None) -> Tensor:
    """Compute attention for this rank's queries. `ContextShard.method` matters only in layers with full attention."""
    assert isinstance(context, ShardedContext), "needs the context of a `ContextShard`"
    plan, shard = context.plan(chunk), context.shard
    if plan.block is None:
        return _FULL[shard.method](q_BLHK, k_BLGK, v_BLGK, shard, plan)
    if plan.segments is None:
        return attend(q_BLHK, k_BLGK, v_BLGK, plan)
    kv = torch.stack([k_BLGK, v_BLGK])
    if plan.halo:
        kv = torch.cat([kv, _halo(kv, plan.block, shard)], dim=2)
    return attend_segments(q_BLHK, kv[0], kv[1], plan.segments)


def _halo(kv_2BLGK: Tensor, chunk: int, shard: ContextShard) -> Tensor:
    """Return the blocks of keys and values before this rank's head and tail that are on other ranks, concatenated.

    The block before the head is the last one of the previous rank's head. The block before the tail is the last one of
    the next rank's tail. A rank that receives nothing gets an empty tensor, and so takes part in the backward pass.
    """
    axis, head = shard.axis, shard.head
    has_tail, is_first, is_last = kv_2BLGK.shape[2] > head, axis.rank == 0, axis.rank == axis.size - 1
    to_before = kv_2BLGK[:, :, -chunk:] if has_tail and not is_first else kv_2BLGK[:, :, :0]
    to_after = kv_2BLGK[:, :, :0] if is_last else kv_2BLGK[:, :, head - chunk : head]
    send, receive = [0] * axis.size, [0] * axis.size
    if not is_first:
        send[axis.rank - 1], receive[axis.rank - 1] = int(has_tail) * chunk, chunk
    if not is_last:
        send[axis.rank + 1], receive[axis.rank + 1] = chunk, int(has_tail) * chunk
    rows = torch.cat([to_before, to_after], dim=2).movedim(2, 0)
    return all_to_all(rows, send, receive, axis, "halo").movedim(0, 2)


def _gather(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, shard: ContextShard, plan: AttentionPlan) -> Tensor:
    """Gather all keys and values: one all-gather, and one reduce-scatter in the backward pass."""
    assert plan.segments is not None
    gathered = all_gather(torch.stack([k_BLGK, v_BLGK]), shard.axis, 0, "keys and values")
    k_BTGK, v_BTGK = shard.unshard(gathered.unflatten(0, (shard.axis.size, 2)).unbind(0), 2)
    return attend_segments(q_BLHK, k_BTGK, v_BTGK, plan.segments)


def _ulysses(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, shard: ContextShard, plan: AttentionPlan) -> Tensor:
    """Give each rank some heads of the whole sequence, attend, and return the results to the ranks of their positions:
    two all-to-alls, and two in the backward pass. Ranks get consecutive heads: query heads with their key head.
    """
    assert plan.segments is not None
    size, ones = shard.axis.size, [1] * shard.axis.size
    heads = [x.unflatten(2, (size, -1)) for x in (q_BLHK, k_BLGK, v_BLGK)]
    counts = [x.shape[3] for x in heads]
    sent_RBLHK = torch.cat(heads, dim=3).movedim(2, 0)
    got_RBLHK = all_to_all(sent_RBLHK, ones, ones, shard.axis, "heads")
    q_BTHK, k_BTGK, v_BTGK = shard.unshard(got_RBLHK.unbind(0), 1).split(counts, dim=2)
    y_BTHK = attend_segments(q_BTHK, k_BTGK, v_BTGK, plan.segments)
    back_RBLHK = all_to_all(torch.stack(shard.shards(y_BTHK, 1)), ones, ones, shard.axis, "heads")
    return back_RBLHK.movedim(0, 2).flatten(2, 3)


def _ring(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, shard: ContextShard, plan: AttentionPlan) -> Tensor:
    """Pass keys and values around the ring and merge the partial results by log-sum-exp."""
    assert isinstance(plan, RingPlan)
    return _Ring.apply(q_BLHK, k_BLGK, v_BLGK, shard.axis, plan.rounds)


_FULL = {ContextMethod.gather: _gather, ContextMethod.ulysses: _ulysses, ContextMethod.ring: _ring}


class _Ring(torch.autograd.Function):
    """In the backward pass keys and values go around again. Their gradients follow, and each rank adds its part."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: MeshAxis, rounds: tuple[list[Segment], ...]) -> Tensor:
        partial, kv = PartialAttention(q), torch.stack([k, v])
        for turn, parts in enumerate(rounds):
            arrived = ring_shift(kv, axis, "ring") if turn < axis.size - 1 else None
            partial.update(kv[0], kv[1], parts)
            kv = arrived() if arrived is not None else kv
        out = partial.result()
        ctx.save_for_backward(q, k, v, out, partial.lse_BHT)
        ctx.axis, ctx.rounds = axis, rounds
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        axis, found, kv = ctx.axis, AttentionGradients(grads[0], q, out, lse), torch.stack([k, v])
        own, sent = torch.zeros_like(kv, dtype=lse.dtype), None
        for turn, parts in enumerate(ctx.rounds):
            arrived = ring_shift(kv, axis, "ring") if turn < axis.size - 1 else None
            gradient = torch.zeros_like(own) if turn else own
            found.update(kv[0], kv[1], gradient[0], gradient[1], parts)
            if turn:
                gradient = gradient if sent is None else gradient + sent()
                sent = ring_shift(gradient, axis, "ring")
            kv = arrived() if arrived is not None else kv
        assert sent is not None
        dk, dv = (own + sent()).to(k.dtype)
        return found.dq_BTHK.to(q.dtype), dk, dv, None, None
