"""Cross-entropy over a vocabulary that is sharded over tensor-parallel ranks, without gathering the logits.

Shapes: B batch, T sequence, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.collectives import all_gather_no_grad
from parallel.mesh import MeshAxis


def token_losses(logits_BTV: Tensor, labels_BT: Tensor, axis: MeshAxis) -> Tensor:
    """Return the cross-entropy [B, T] in nats, in the dtype of `logits_BTV`. Labels are ids of the whole vocabulary.

    Every rank of the axis gets the same losses, and the gradient of its own logits.
    """
    return _CrossEntropy.apply(logits_BTV, labels_BT, axis)


def whole_logits(logits: Tensor, axis: MeshAxis) -> Tensor:
    """Return the logits over the whole vocabulary, on every rank, without a gradient."""
    return all_gather_no_grad(logits, axis, logits.dim() - 1, "logits")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, labels_BT: Tensor, axis: MeshAxis) -> Tensor:
        size = logits_BTV.shape[-1]
        highest_BT = logits_BTV.amax(-1)
        axis.reduce(highest_BT, "loss", dist.ReduceOp.MAX)
        local_BT = labels_BT - axis.rank * size
        here_BT = (local_BT >= 0) & (local_BT < size)
        local_BT1 = local_BT.clamp(0, size - 1)[..., None]
        exponentials_BT = (logits_BTV - highest_BT[..., None]).exp().sum(-1)
        sums = torch.stack([exponentials_BT, logits_BTV.gather(-1, local_BT1)[..., 0] * here_BT])
        axis.sum(sums, "loss")
        lse_BT = highest_BT + sums[0].log()
        ctx.save_for_backward(logits_BTV, lse_BT, local_BT1, here_BT)
        return lse_BT - sums[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_BTV, lse_BT, local_BT1, here_BT = ctx.saved_tensors
        gradient = (logits_BTV - lse_BT[..., None]).exp()
        gradient.scatter_add_(-1, local_BT1, -here_BT[..., None].to(gradient.dtype))
        return gradient.mul_(grads[0][..., None]), None, None
