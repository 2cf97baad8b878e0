"""Compare Triton's kernels of the loss with PyTorch's operations in float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels import LossKernels
from model.kernels.loss import LossSums
from model.kernels.triton_loss import TritonLossKernels

LOSSES = {"two blocks": [9, 5], "wide": [1030, 40], "one word": [1]}
"""The numbers of words of the blocks."""


def loss_errors(name: str, dtype: str, device: str, shift: int = 0) -> dict[str, float]:
    """Return the error of each sum and of the gradients, relative to the largest value. `shift` misplaces a block."""
    given = getattr(torch, dtype)
    wanted = _results(LOSSES[name], LossKernels(), given, torch.float64, "cpu")
    found = _results(LOSSES[name], TritonLossKernels(), given, given, device, shift)
    return {
        key: float((found[key].double().cpu() - x).abs().max() / x.abs().max().clamp_min(1))
        for key, x in wanted.items()
    }


def _results(
    widths: list[int], kernels: LossKernels, given: torch.dtype, dtype: torch.dtype, device: str, shift: int = 0
) -> dict[str, Tensor]:
    generator, words = torch.Generator().manual_seed(0), sum(widths)
    logits = (3 * torch.randn(4, words, generator=generator, dtype=torch.float64)).to(given)
    logits[1, :2] = 9.0  # equals
    logits, labels = logits.to(device, dtype), torch.tensor([0, words - 1, -100, words // 2], device=device)
    sums = LossSums.empty(labels, dtype, likeliest=True)
    first = 0
    for block in logits.split(widths, 1):
        kernels.add(sums, block.clone(), labels, first + shift)
        first += block.shape[1]
    assert sums.likeliest_T is not None
    found = {"largest": sums.largest_T, "exponentials": sums.exponentials_T, "label": sums.label_T}
    found["likeliest"] = sums.likeliest_T.double()
    lse = sums.largest_T + sums.exponentials_T.log()
    grad = torch.tensor([1.0, -0.5, 0, 2], device=device).to(lse.dtype)
    first, parts = 0, []
    for block in logits.split(widths, 1):
        parts.append(kernels.gradient(block.clone(), lse, grad, labels, first + shift))
        first += block.shape[1]
    return found | {"gradient": torch.cat(parts, 1)}
