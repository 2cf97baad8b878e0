"""Collectives that gradients flow through. The backward pass of each is the transposed collective.

Each rank of an axis has the whole tensor, a shard of it, or a partial tensor. Partial tensors add up to the whole one.
The gradient of a whole tensor is partial, because each rank uses the tensor for its own part of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
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
    axis.count(purpose, shard)
    parts = shard.new_empty((axis.size * shard.shape[0], *shard.shape[1:]))
    all_gather_single(parts, shard.contiguous(), group=axis.group)
    return parts if dim == 0 else torch.cat(parts.chunk(axis.size), dim)


def _reduce_scatter_no_grad(tensor: Tensor, axis: MeshAxis, dim: int, purpose: str) -> Tensor:
    axis.count(purpose, tensor)
    parts = tensor if dim == 0 else torch.cat(tensor.chunk(axis.size, dim))
    shard = tensor.new_empty((parts.shape[0] // axis.size, *parts.shape[1:]))
    reduce_scatter_single(shard, parts.contiguous(), group=axis.group)
    return shard


def _all_to_all_no_grad(rows: Tensor, send: list[int], receive: list[int], axis: MeshAxis, purpose: str) -> Tensor:
    axis.count(purpose, rows)
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=axis.group)
    return received


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
