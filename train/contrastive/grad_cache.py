"""Backpropagate a contrastive loss through micro-batches without changing it (GradCache: Gao et al. 2021, arXiv
2101.06983).

A contrastive loss compares all pairs of the batch, so the losses of micro-batches do not add up to it. Instead every
micro-batch is encoded without a graph, the loss of all features gives their gradients, and each micro-batch is encoded
again and backpropagated from its features' gradients. One more forward pass buys the memory of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Pairs = TypeVar("Pairs")


def backward_in_parts(
    micro_batches: Sequence[Pairs],
    encode: Callable[[Pairs], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Accumulate the gradients of `loss` on all pairs of this rank, and return its value.

    `encode` maps pairs to features of images and texts, both [B, E]; it is called twice for each micro-batch and must
    return the same features. `loss` is called once and may take part in collectives. All ranks need the same number of
    micro-batches if `encode` takes part in collectives, as under FSDP.
    """
    if len(micro_batches) == 1:
        value = loss(*encode(micro_batches[0]))
        value.backward()
        return value.detach()
    with torch.no_grad():
        parts = [encode(pairs) for pairs in micro_batches]
    images, texts = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    value = loss(images, texts)
    value.backward()
    assert images.grad is not None and texts.grad is not None
    sizes = [len(side) for side, _ in parts]
    gradients = zip(images.grad.split(sizes), texts.grad.split(sizes), strict=True)
    for pairs, given in zip(micro_batches, gradients, strict=True):
        sides = zip(encode(pairs), given, strict=True)
        trained, back = zip(*(side for side in sides if side[0].requires_grad), strict=True)  # a tower may be frozen
        torch.autograd.backward(trained, back)
    return value.detach()
