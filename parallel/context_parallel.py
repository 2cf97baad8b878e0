"""Context parallelism: each rank of the axis has a part of every row.

Rows are cut in whole chunks, so that chunked layers need nothing from other ranks, or the chunk before where documents
start inside a chunk and reach into the next. A rank has some chunks from the row's head and as many from its tail:
later queries see more keys, so the sum is even where a rank's chunks are even in number, and as even as whole chunks
allow elsewhere. Layers that see the whole row get its keys in one of three ways (`ContextMethod`).

Shapes: B batch, T sequence of the whole row, L this rank's part of it, H query heads, G key/value
heads, K head width, R ranks.
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
from model.config import ModelConfig
from model.transformer import Layer, Transformer
from parallel.comm.collectives import exchange, gather, pass_on
from parallel.layout import ContextMethod, row_unit
from parallel.mesh import MeshAxis


def apply(model: Transformer, axis: MeshAxis, method: ContextMethod) -> None:
    """Give every attention the way in which it sees keys on other ranks."""
    if axis.size == 1:
        return
    attend = _KINDS[method](axis)
    for layer in model.layers.values():
        assert isinstance(layer, Layer)
        layer.attention.attend = attend


@dataclass(frozen=True)
class ContextShard:
    """This rank's part of rows of one length, cut between multiples of `unit` positions."""

    axis: MeshAxis
    length: int
    unit: int
    method: ContextMethod

    def runs(self, rank: int) -> list[SegmentRun]:
        """What a rank has, in its order: ceil(m/2) of its m units from the row's head, in the order of ranks, and the
        others from its tail, in the reverse order.
        """
        units = self.length // self.unit // self.axis.size
        head, tail = -(-units // 2) * self.unit, units // 2 * self.unit
        found = [SegmentRun(rank * head, (rank + 1) * head, 0)]
        if tail:
            found.append(SegmentRun(self.length - (rank + 1) * tail, self.length - rank * tail, head))
        return found

    def lacking(self, rank: int) -> list[SegmentRun]:
        """Those of a rank's runs whose predecessor another rank has."""
        runs, last = self.runs(rank), self.axis.size - 1
        return [*(runs[:1] if rank > 0 else []), *(runs[1:] if rank < last else [])]

    @cached_property
    def columns(self) -> Tensor:
        """The positions of this rank, on the host: int64 [L], ascending."""
        return torch.cat([torch.arange(run.start, run.stop) for run in self.runs(self.axis.rank)])

    @property
    def head(self) -> int:
        """How much of this rank's part is from the head of rows."""
        return self.runs(0)[0].stop

    def take(self, x_BT: Tensor) -> Tensor:
        """This rank's columns."""
        return x_BT if self.axis.size == 1 else x_BT.index_select(1, self.columns.to(x_BT.device))

    def whole(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The ranks' parts put in the order of the row."""
        heads = [part.narrow(dim, 0, self.head) for part in parts]
        tails = [part.narrow(dim, self.head, part.shape[dim] - self.head) for part in reversed(parts)]
        return torch.cat(heads + tails, dim)

    def parts(self, x: Tensor, dim: int) -> list[Tensor]:
        """Each rank's part of something whole: what `whole` undoes."""
        return [
            torch.cat([x.narrow(dim, run.start, run.stop - run.start) for run in self.runs(rank)], dim)
            for rank in range(self.axis.size)
        ]

    def context(self, positions_BT: Tensor, device: torch.device, routed_tokens: float | None = None) -> ForwardContext:
        """What the layers know of whole rows at these positions."""
        if self.axis.size == 1:
            return ForwardContext(positions_BT, device, routed_tokens)
        return PartContext(self, positions_BT, device, routed_tokens)


def share(model: ModelConfig, length: int, axis: MeshAxis, method: ContextMethod) -> ContextShard:
    """How rows of this length are divided."""
    return ContextShard(axis, length, row_unit(model, length), method)


@dataclass(frozen=True)
class PartPlan(AttentionPlan):
    """Attention over rows of which this rank has a part. `rounds`: the pieces with the keys of this rank, then of the
    one before it, and so on round the ranks.
    """

    rounds: tuple[list[Segment], ...] = ()


class PartContext(ForwardContext):
    """Of this rank's columns; but the documents of whole rows, which all ranks know alike, decide what is exchanged."""

    def __init__(
        self, share: ContextShard, positions_BT: Tensor, device: torch.device, routed_tokens: float | None = None
    ) -> None:
        self.share, self._whole_BT = share, positions_BT.cpu()
        super().__init__(share.take(self._whole_BT), device, routed_tokens)

    def _make_plan(self, chunk: int | None) -> AttentionPlan:
        share = self.share
        if chunk is None or chunk >= share.length:
            return self._global(document_bounds(self._whole_BT == 0))
        starts_BT, own = self._whole_BT % chunk == 0, share.runs(share.axis.rank)
        if bool((starts_BT == on_grid(share.length, chunk)).all()):
            return AttentionPlan(block=chunk)
        keys, halo = list(own), not bool(starts_BT[:, ::chunk].all())
        if halo:  # a chunk of a document is no longer than a block, so it reaches no further than the block before
            at = own[-1].at + own[-1].stop - own[-1].start
            for run in share.lacking(share.axis.rank):
                keys.append(SegmentRun(run.start - chunk, run.start, at))
                at += chunk
        return AttentionPlan(block=chunk, halo=halo, segments=plan_segments(document_bounds(starts_BT), own, keys))

    def _global(self, rows: DocumentBounds) -> AttentionPlan:
        share, rank, size = self.share, self.share.axis.rank, self.share.axis.size
        own, whole = share.runs(rank), [SegmentRun(0, share.length, 0)]
        if share.method is ContextMethod.ulysses:
            return AttentionPlan(segments=plan_segments(rows, whole, whole))
        if share.method is ContextMethod.gather:
            return AttentionPlan(segments=plan_segments(rows, own, whole))
        return PartPlan(
            rounds=tuple(plan_segments(rows, own, share.runs((rank - turn) % size)) for turn in range(size))
        )


@dataclass(frozen=True)
class _AttendShard:
    """An attention's way; the methods differ in layers that see the whole row."""

    axis: MeshAxis

    def __call__(
        self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, context: ForwardContext, chunk: int | None
    ) -> Tensor:
        assert isinstance(context, PartContext), "rows in parts need the context that `Share` makes"
        plan = context.plan(chunk)
        if plan.block is None:
            return self.globally(q_BLHK, k_BLGK, v_BLGK, context.share, plan)
        if plan.segments is None:
            return attend(q_BLHK, k_BLGK, v_BLGK, plan)
        kv = torch.stack([k_BLGK, v_BLGK])
        if plan.halo:
            kv = torch.cat([kv, self._before(kv, plan.block, context.share.head)], dim=2)
        return attend_segments(q_BLHK, kv[0], kv[1], plan.segments)

    def globally(
        self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, share: ContextShard, plan: AttentionPlan
    ) -> Tensor:
        raise NotImplementedError

    def _before(self, kv_2BLGK: Tensor, chunk: int, head: int) -> Tensor:
        """The blocks before this rank's head and tail that lie elsewhere (`Share.lacking`), one after the other.

        What is before the head is the last of the head of the rank before, what is before the tail the last of the tail
        of the rank after. Ranks that receive nothing take part all the same: the way back needs them.
        """
        axis, has_tail = self.axis, kv_2BLGK.shape[2] > head
        is_first, is_last = axis.rank == 0, axis.rank == axis.size - 1
        to_before = kv_2BLGK[:, :, -chunk:] if has_tail and not is_first else kv_2BLGK[:, :, :0]
        to_after = kv_2BLGK[:, :, :0] if is_last else kv_2BLGK[:, :, head - chunk : head]
        send, receive = [0] * axis.size, [0] * axis.size
        if not is_first:
            send[axis.rank - 1], receive[axis.rank - 1] = int(has_tail) * chunk, chunk
        if not is_last:
            send[axis.rank + 1], receive[axis.rank + 1] = chunk, int(has_tail) * chunk
        rows = torch.cat([to_before, to_after], dim=2).movedim(2, 0)
        return exchange(rows, send, receive, axis, "halo").movedim(0, 2)


class Gather(_AttendShard):
    """All keys and values come here; the queries stay. One all-gather, and a reduce-scatter in the backward pass."""

    def globally(
        self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, share: ContextShard, plan: AttentionPlan
    ) -> Tensor:
        assert plan.segments is not None
        gathered = gather(torch.stack([k_BLGK, v_BLGK]), self.axis, 0, "keys and values")
        k_BTGK, v_BTGK = share.whole(gathered.unflatten(0, (self.axis.size, 2)).unbind(0), 2)
        return attend_segments(q_BLHK, k_BTGK, v_BTGK, plan.segments)


class Ulysses(_AttendShard):
    """Heads for positions and back: two all-to-alls, and two in the backward pass. Ranks get consecutive heads, so that
    each query head finds its key head.
    """

    def globally(
        self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, share: ContextShard, plan: AttentionPlan
    ) -> Tensor:
        assert plan.segments is not None
        size, ones = self.axis.size, [1] * self.axis.size
        heads = [x.unflatten(2, (size, -1)) for x in (q_BLHK, k_BLGK, v_BLGK)]
        counts = [x.shape[3] for x in heads]
        sent_RBLHK = torch.cat(heads, dim=3).movedim(2, 0)
        got_RBLHK = exchange(sent_RBLHK, ones, ones, self.axis, "heads")
        q_BTHK, k_BTGK, v_BTGK = share.whole(got_RBLHK.unbind(0), 1).split(counts, dim=2)
        y_BTHK = attend_segments(q_BTHK, k_BTGK, v_BTGK, plan.segments)
        back_RBLHK = exchange(torch.stack(share.parts(y_BTHK, 1)), ones, ones, self.axis, "heads")
        return back_RBLHK.movedim(0, 2).flatten(2, 3)


class Ring(_AttendShard):
    """Keys and values go round; what a rank has seen of them is merged by log-sum-exp."""

    def globally(
        self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, share: ContextShard, plan: AttentionPlan
    ) -> Tensor:
        assert isinstance(plan, PartPlan)
        return _Ring.apply(q_BLHK, k_BLGK, v_BLGK, self.axis, plan.rounds)


class _Ring(torch.autograd.Function):
    """In the backward pass keys and values go round again, and behind them their gradients, to which each rank adds."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: MeshAxis, rounds: tuple[list[Segment], ...]) -> Tensor:
        partial, kv = PartialAttention(q), torch.stack([k, v])
        for turn, parts in enumerate(rounds):
            arrived = pass_on(kv, axis, "ring") if turn < axis.size - 1 else None
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
            arrived = pass_on(kv, axis, "ring") if turn < axis.size - 1 else None
            gradient = torch.zeros_like(own) if turn else own
            found.update(kv[0], kv[1], gradient[0], gradient[1], parts)
            if turn:
                gradient = gradient if sent is None else gradient + sent()
                sent = pass_on(gradient, axis, "ring")
            kv = arrived() if arrived is not None else kv
        assert sent is not None
        dk, dv = (own + sent()).to(k.dtype)
        return found.dq_BTHK.to(q.dtype), dk, dv, None, None


_KINDS: dict[ContextMethod, type[_AttendShard]] = {
    ContextMethod.gather: Gather,
    ContextMethod.ulysses: Ulysses,
    ContextMethod.ring: Ring,
}
