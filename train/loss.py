"""Compute the language-model loss as a sum over tokens. The engine divides it by the global number of tokens.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from data.loader import IGNORED
from parallel import vocab_parallel_loss
from parallel.mesh import MeshAxis
from precision.gemm import widened


def summed_loss(logits_BTV: Tensor, labels_BT: Tensor, tp: MeshAxis) -> Tensor:
    """Sum the cross-entropy of labelled tokens in nats, computed in at least float32."""
    return token_losses(logits_BTV, labels_BT, tp).sum()


def token_losses(logits_BTV: Tensor, labels_BT: Tensor, tp: MeshAxis | None = None) -> Tensor:
    """Return the cross-entropy of each position [B, T] in nats, 0 where the label is ignored. Under tensor parallelism
    the logits are this rank's part of the vocabulary, and all ranks of the axis get the same losses.
    """
    wide = widened(logits_BTV)
    if tp is not None and tp.size > 1:
        return vocab_parallel_loss.token_losses(wide, labels_BT.clamp_min(0), tp) * (labels_BT != IGNORED)
    losses = F.cross_entropy(wide.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(labels_BT)
