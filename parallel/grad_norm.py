"""The norm of a gradient whose parts lie on many ranks, each part counted once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from parallel.mesh import Meshes
from parallel.sharding import ShardSpec, local


@torch.no_grad()
def gradient_norm(model: nn.Module, specs: Mapping[str, ShardSpec], meshes: Meshes) -> Tensor:
    """Euclidean norm of all gradients, a scalar on the device, the same on every rank.

    Of the ranks that keep the same part, its owner counts it; one sum over the world adds up dense and expert parts.
    Raises `ValueError` where a parameter has no gradient: it would be left out silently.
    """
    squares, device = [], None
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise ValueError(f"{name} has no gradient")
        device = parameter.grad.device
        if specs[name].is_owner and local(parameter.grad).numel():
            squares.append(local(parameter.grad))
    total = torch.zeros((), dtype=torch.float64, device=device)
    if squares:
        total += torch.stack(torch._foreach_norm(squares)).double().square().sum()
    meshes.world.sum(total, "norm")
    return total.sqrt()


@torch.no_grad()
def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiply every gradient in place, without asking the device for the factor."""
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_([g for g in gradients if g.numel()], factor)
