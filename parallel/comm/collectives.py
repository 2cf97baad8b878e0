"""Collectives that gradients flow through. The backward of each is the collective that transposes it.

A tensor is `whole` on every rank of an axis, a `shard` of it, or `partial`: the ranks' sum is meant. Gradients of a
whole tensor are partial here, since each rank uses it for its own part of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import MeshAxis

# torch 2.13 has new names for these and warns of the old ones at every call
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(shard: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
    """Shards along `dim` to the whole tensor on every rank; the gradient is summed and scattered."""
    return shard if axis.size == 1 else _Gather.apply(shard, axis, dim, purpose)


def reduce_scatter(partial: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
    """The sum of the ranks' partial tensors, cut along `dim`, which must divide; the gradient is gathered."""
    return partial if axis.size == 1 else _Scatter.apply(partial, axis, dim, purpose)


def all_to_all(rows: Tensor, send: list[int], receive: list[int], axis: MeshAxis, purpose: str) -> Tensor:
    """All-to-all of rows: `send[i]` of them go to rank i, `receive[i]` come from there; the gradient goes back."""
    return _Exchange.apply(rows, send, receive, axis, purpose)


def all_reduce(partial: Tensor, axis: MeshAxis, purpose: str) -> Tensor:
    """The ranks' sum on every rank, each of which uses it for a part of its own; the gradient is summed as well."""
    return partial if axis.size == 1 else _Total.apply(partial, axis, purpose)


def ring_shift(tensor: Tensor, axis: MeshAxis, purpose: str) -> Callable[[], Tensor]:
    """Send a tensor to the next rank of the axis, in a circle, and start to receive one of the same shape from the rank
    before; what is returned waits for it. No gradient.
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
    """`gather` where no gradient is wanted."""
    if axis.size == 1:
        return shard
    axis.count(purpose, shard)
    parts = shard.new_empty((axis.size * shard.shape[0], *shard.shape[1:]))
    all_gather_single(parts, shard.contiguous(), group=axis.group)
    return parts if dim == 0 else torch.cat(parts.chunk(axis.size), dim)


def _scatter_plain(partial: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
    axis.count(purpose, partial)
    parts = partial if dim == 0 else torch.cat(partial.chunk(axis.size, dim))
    shard = partial.new_empty((parts.shape[0] // axis.size, *parts.shape[1:]))
    reduce_scatter_single(shard, parts.contiguous(), group=axis.group)
    return shard


def _exchange_plain(rows: Tensor, send: list[int], receive: list[int], axis: MeshAxis, purpose: str) -> Tensor:
    axis.count(purpose, rows)
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=axis.group)
    return received


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
        ctx.arguments = axis, dim, purpose
        return all_gather_no_grad(shard, axis, dim, purpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _scatter_plain(grads[0], *ctx.arguments), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
        ctx.arguments = axis, dim, purpose
        return _scatter_plain(partial, axis, dim, purpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return all_gather_no_grad(grads[0], *ctx.arguments), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], axis: MeshAxis, purpose: str) -> Tensor:
        ctx.arguments = receive, send, axis, purpose
        return _exchange_plain(rows, send, receive, axis, purpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _exchange_plain(grads[0], *ctx.arguments), None, None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: MeshAxis, purpose: str) -> Tensor:
        ctx.arguments = axis, purpose
        result = partial.clone()
        axis.sum(result, purpose)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        axis, purpose = ctx.arguments
        result = grads[0].clone()
        axis.sum(result, purpose)
        return result, None, None
