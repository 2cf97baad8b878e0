"""Collectives that gradients flow through. The backward pass of each is the transposed collective.

Each rank of an axis has the whole tensor, a shard of it, or a partial tensor. Partial tensors add up to the whole one.
The gradient of a whole tensor is partial, because each rank uses the tensor for its own part of the loss.

A function `start_...` begins a collective and returns a function that waits for its result. In the backward pass the
order is reversed: where the forward pass waited, the transposed collective begins, and where it began, its result is
waited for. What runs between the two overlaps with the collective in both passes, on CUDA because a collective has a
stream of its own. torch keeps the tensors of a collective until it has been waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import MeshAxis

# torch 2.13 renames these two functions and warns at every call by an old name
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(shard: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
    """Join shards along `dim` to the whole tensor, on every rank. The gradient is summed over ranks and scattered."""
    return _apply(shard, axis, all_gather_no_grad, _reduce_scatter_no_grad, dim, purpose)


def reduce_scatter(tensor: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
    """Sum partial tensors and scatter the sum along `dim`, which must divide evenly. The gradient is gathered."""
    return _apply(tensor, axis, _reduce_scatter_no_grad, all_gather_no_grad, dim, purpose)


def all_reduce(tensor: Tensor, axis: MeshAxis, purpose: str) -> Tensor:
    """Sum partial tensors. Every rank uses the sum for its own part of the loss, so the gradient is summed too."""
    return _apply(tensor, axis, _all_reduce_no_grad, _all_reduce_no_grad, purpose)


def all_to_all(rows: Tensor, send: list[int], receive: list[int], axis: MeshAxis, purpose: str) -> Tensor:
    """Send `send[i]` rows to rank i and receive `receive[i]` rows from it. Gradients are sent the other way."""
    there = partial(_all_to_all_no_grad, axis=axis, purpose=purpose, send=send, receive=receive)
    back = partial(_all_to_all_no_grad, axis=axis, purpose=purpose, send=receive, receive=send)
    return _Collective.apply(rows, there, back)


def start_all_to_all(
    rows: Tensor, send: list[int], receive: list[int], axis: MeshAxis, purpose: str
) -> Callable[[], Tensor]:
    """Start `all_to_all`."""
    return _started(
        rows,
        partial(_begin_all_to_all, axis=axis, purpose=purpose, send=send, receive=receive),
        partial(_begin_all_to_all, axis=axis, purpose=purpose, send=receive, receive=send),
        partial(axis.wait, purpose),
    )


def start_all_gather(shard: Tensor, axis: MeshAxis, purpose: str) -> Callable[[], Tensor]:
    """Start `all_gather` along the first dimension."""
    there, back = partial(_begin_all_gather, axis, purpose), partial(_begin_reduce_scatter, axis, purpose)
    return _started(shard, there, back, partial(axis.wait, purpose))


def start_reduce_scatter(tensor: Tensor, axis: MeshAxis, purpose: str) -> Callable[[], Tensor]:
    """Start `reduce_scatter` along the first dimension."""
    there, back = partial(_begin_reduce_scatter, axis, purpose), partial(_begin_all_gather, axis, purpose)
    return _started(tensor, there, back, partial(axis.wait, purpose))


def ring_shift(tensor: Tensor, axis: MeshAxis, purpose: str) -> Callable[[], Tensor]:
    """Start to send a tensor to the next rank of the axis, in a ring, and to receive one of the same shape from the
    previous rank. Returns a function that waits for the received tensor and returns it. No gradient flows through it.
    """
    axis.count(purpose, tensor)
    flat, received = tensor.contiguous().view(-1), torch.empty_like(tensor.contiguous())
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    send, receive = ([flat.numel() * (rank == other) for rank in range(axis.size)] for other in (after, before))
    work = dist.all_to_all_single(received.view(-1), flat, receive, send, group=axis.group, async_op=True)

    def arrived() -> Tensor:
        work.wait()
        return received

    return arrived


def all_gather_no_grad(shard: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
    if axis.size == 1:
        return shard
    parts, _ = _begin_all_gather(axis, purpose, shard, async_op=False)
    return parts if dim == 0 else torch.cat(parts.chunk(axis.size), dim)


def _reduce_scatter_no_grad(tensor: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
    parts = tensor if dim == 0 else torch.cat(tensor.chunk(axis.size, dim))
    return _begin_reduce_scatter(axis, purpose, parts, async_op=False)[0]


def _all_to_all_no_grad(rows: Tensor, send: list[int], receive: list[int], axis: MeshAxis, purpose: str) -> Tensor:
    return _begin_all_to_all(rows, send, receive, axis, purpose, async_op=False)[0]


def _begin_all_gather(axis: MeshAxis, purpose: str, shard: Tensor, async_op: bool = True) -> _Begun:
    axis.count(purpose, shard)
    parts = shard.new_empty((axis.size * shard.shape[0], *shard.shape[1:]))
    return parts, all_gather_single(parts, shard.contiguous(), group=axis.group, async_op=async_op)


def _begin_reduce_scatter(axis: MeshAxis, purpose: str, tensor: Tensor, async_op: bool = True) -> _Begun:
    axis.count(purpose, tensor)
    shard = tensor.new_empty((tensor.shape[0] // axis.size, *tensor.shape[1:]))
    return shard, reduce_scatter_single(shard, tensor.contiguous(), group=axis.group, async_op=async_op)


def _begin_all_to_all(
    rows: Tensor, send: list[int], receive: list[int], axis: MeshAxis, purpose: str, async_op: bool = True
) -> _Begun:
    axis.count(purpose, rows)
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    work = dist.all_to_all_single(received, rows.contiguous(), receive, send, group=axis.group, async_op=async_op)
    return received, work


def _all_reduce_no_grad(tensor: Tensor, axis: MeshAxis, purpose: str) -> Tensor:
    result = tensor.clone()
    axis.sum(result, purpose)
    return result


def _apply(tensor: Tensor, axis: MeshAxis, forward: Any, backward: Any, *arguments: Any) -> Tensor:
    if axis.size == 1:
        return tensor
    return _Collective.apply(tensor, lambda x: forward(x, axis, *arguments), lambda x: backward(x, axis, *arguments))


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward: Any, backward: Any) -> Tensor:
        ctx.transposed = backward
        return forward(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed(grads[0]), None, None


_Begun = tuple[Tensor, Any]
"""The result of a collective, which may not be there yet, and torch's handle to wait for it."""


def _started(
    tensor: Tensor, there: Callable[[Tensor], _Begun], back: Callable[[Tensor], _Begun], note: Callable[[], None]
) -> Callable[[], Tensor]:
    """Begin the collective `there`. `note` tells the watchdog that this rank waits for it, or for `back`."""

    def transfer(collective: Callable[[Tensor], _Begun], tensor: Tensor) -> Callable[[], tuple[Tensor]]:
        result, work = collective(tensor)

        def arrived() -> tuple[Tensor]:
            note()
            work.wait()
            return (result,)

        return arrived

    arrived = start((tensor,), partial(transfer, there), partial(transfer, back))
    return lambda: arrived()[0]


Transfer = Callable[..., Callable[[], tuple[Tensor, ...]]]
"""Begins to transfer tensors. Returns a function that waits for the tensors that arrive."""


def start(tensors: tuple[Tensor, ...], there: Transfer, back: Transfer) -> Callable[[], tuple[Tensor, ...]]:
    """Begin to transfer tensors with `there`; in the backward pass, the gradients of what arrived with `back`. Returns
    a function that waits for what arrives. Call it once.
    """
    under_way = _UnderWay(there, back)
    link = _Start.apply(under_way, *tensors)
    return lambda: _Finish.apply(link, under_way)


@dataclass(eq=False)
class _UnderWay:
    """A transfer between its start and its end: first the one of the forward pass, then that of the gradients."""

    there: Transfer
    back: Transfer
    arrived: Callable[[], tuple[Tensor, ...]] | None = None

    def end(self) -> tuple[Tensor, ...]:
        assert self.arrived is not None, "a transfer is waited for once"
        arrived, self.arrived = self.arrived, None
        return arrived()


class _Start(torch.autograd.Function):
    """Returns an empty tensor, whose only use is to order the backward pass."""

    @staticmethod
    def forward(ctx: Any, under_way: _UnderWay, *tensors: Tensor) -> Tensor:
        ctx.under_way = under_way
        under_way.arrived = under_way.there(*tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.under_way.end()


class _Finish(torch.autograd.Function):
    """Autograd runs the node that was made last first: this one starts, what was made in between runs, and `_Start`
    waits.
    """

    @staticmethod
    def forward(ctx: Any, link: Tensor, under_way: _UnderWay) -> tuple[Tensor, ...]:
        ctx.under_way = under_way
        return under_way.end()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.under_way.arrived = ctx.under_way.back(*grads)
        return grads[0].new_empty(0), None
