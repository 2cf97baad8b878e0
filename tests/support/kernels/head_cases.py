"""Compare `heads` and `rms_norm` of a set of kernels with PyTorch's operations in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.attention.rope import frequencies, rotation
from model.config import RopePairing
from model.kernels import StepKernels, TorchKernels
from model.kernels.heads import HeadStep

STEPS = {
    "adjacent": (HeadStep(3, 1, 16), True, False),
    "halves, normalised": (HeadStep(4, 2, 8, RopePairing.halves, 1e-5), True, False),
    "normalised, temperature": (HeadStep(3, 3, 32, norm_eps=1e-5, query_scale=0.5), True, True),
    "no positions": (HeadStep(2, 1, 8, query_scale=3.0), False, True),
    "many heads": (HeadStep(260, 1, 16, norm_eps=1e-2), True, True),
    "no power of two": (HeadStep(2, 1, 12), True, True),
}
"""A step, and whether it rotates and has a temperature."""
FLAWS = ("rotation", "norm", "temperature", "pairing", "sequences", "temperatures")
"""Errors that `head_errors` can plant in the kernels' input."""


def head_errors(name: str, kernels: StepKernels, dtype: torch.dtype, device: str, flaw: str = "") -> dict[str, float]:
    """Return the error of each result and of the gradient, relative to the largest value."""
    wanted = _results(name, TorchKernels(), dtype, torch.float64, "cpu")
    found = _results(name, kernels, dtype, dtype, device, flaw)
    return {key: float((found[key].cpu().double() - x).abs().max() / x.abs().max()) for key, x in wanted.items()}


def _results(
    name: str, kernels: Any, given: torch.dtype, dtype: torch.dtype, device: str, flaw: str = ""
) -> dict[str, Tensor]:
    step, rotates, scaled = STEPS[name]
    generator, batch = torch.Generator().manual_seed(0), (2, 5)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(given).to(device, dtype)

    heads = sum(step.heads)
    qkv = values(*batch, heads * step.head_dim).requires_grad_()
    grads = [values(*batch, count, step.head_dim) for count in step.heads]
    positions = torch.arange(5) + torch.tensor([[0], [4]]) + (flaw == "rotation")
    wide = torch.promote_types(dtype, torch.float32)
    turns = rotation(positions, frequencies(step.head_dim, 100.0), wide).to(device) if rotates else None
    steps = (torch.arange(5.0) + torch.tensor([[0.0], [2.0]]))[:, :, None, None]
    scale = (1 + steps * (flaw != "temperature")).to(device, wide) if scaled else None
    if flaw == "sequences" and turns is not None:  # every sequence gets the table of the first
        turns = turns[:1]
    if flaw == "temperatures" and scale is not None:
        scale = scale[:1]
    numbers = (step.num_heads, step.num_kv_heads, step.head_dim)
    if flaw in ("norm", "pairing"):
        eps = None if flaw == "norm" else step.norm_eps
        pairing = RopePairing.halves if flaw == "pairing" else step.pairing
        step = HeadStep(*numbers, pairing, eps, step.query_scale)
    parts = kernels.heads(qkv, step, turns, scale)
    (to_qkv,) = torch.autograd.grad(parts, [qkv], grads)
    x, gain = values(3, 2, 24).requires_grad_(), values(24).float().to(wide).requires_grad_()
    y = kernels.rms_norm(x, gain, 1e-5)
    to_x, to_gain = torch.autograd.grad(y, [x, gain], values(3, 2, 24))
    plain = kernels.rms_norm(x, None, 1e-5)
    return dict(zip("qkv", (part.detach() for part in parts), strict=True)) | {
        "gradient": to_qkv, "norm": y.detach(), "norm of x": to_x, "norm of its gain": to_gain, "plain": plain.detach(),
    }  # fmt: skip
