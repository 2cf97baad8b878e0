"""The norm of a gradient whose parts lie on many ranks, each part counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from parallel.shards import local


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients, a scalar on the device, the same on every rank.

    Gradients on the same mesh form a group: squares of local shards are summed over the mesh dimensions that shard,
    not over those that repeat.
    """
    groups: dict[object, list[DTensor | Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            key = (
                (parameter.grad.device_mesh, parameter.grad.placements) if isinstance(parameter.grad, DTensor) else None
            )
            groups.setdefault(key, []).append(parameter.grad)
    total: Tensor | None = None
    for gradients in groups.values():
        squared = _squared_norm([local(g) for g in gradients])
        first = gradients[0]
        if isinstance(first, DTensor):
            for dimension, placement in enumerate(first.placements):
                if isinstance(placement, Shard):
                    dist.all_reduce(squared, group=first.device_mesh.get_group(dimension))
        total = squared if total is None else total + squared
    if total is None:
        raise ValueError("no parameter has a gradient")
    return total.sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient in place, without asking the device for the factor."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_([g for g in gradients if g.numel()], factor)


def _squared_norm(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm([t for t in tensors if t.numel()])
    if not norms:
        return tensors[0].new_zeros(())
    return torch.stack(norms).square().sum()
