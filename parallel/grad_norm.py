"""The norm of a gradient whose shards are on many ranks. Each shard is counted once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from parallel.mesh import MeshAxis
from parallel.sharding import LocalShard, local


@torch.no_grad()
def gradient_norm(
    gradients: Iterable[LocalShard], world: MeshAxis, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the Euclidean norm of all gradients: a float64 scalar on the device, equal on every rank.

    Of the ranks that keep the same shard, only its owner counts it, so a single sum over the world is right for dense
    and expert parameters. `dtype`: the dtype in which the norm of a shard is computed, by default the gradient's.
    """
    owned = [one.values for one in gradients if one.spec.is_owner and one.values.numel()]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if owned:
        total += torch.stack(torch._foreach_norm(owned, 2, dtype)).double().square().sum()
    world.sum(total, "norm")
    return total.sqrt()


@torch.no_grad()
def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiply every gradient in place, without copying the factor to the host."""
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    filled = [g for g in gradients if g.numel()]
    for dtype in dict.fromkeys(g.dtype for g in filled):
        # a factor of another dtype makes PyTorch launch one kernel for each gradient
        torch._foreach_mul_([g for g in filled if g.dtype is dtype], factor.to(dtype))
