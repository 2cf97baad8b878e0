"""The language-model loss as a sum over tokens, to be divided by the global count known before the backward pass.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position that has no next token of its own document."""


def summed_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of the cross-entropy over labelled tokens, in nats, computed in at least float32."""
    return token_losses(logits_BTV, labels_BT).sum()


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of each position [B, T] in nats, 0 where the label is ignored."""
    wide = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    losses = F.cross_entropy(wide.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(labels_BT)


def label_count(labels_BT: Tensor) -> Tensor:
    """How many positions count, int64 scalar."""
    return (labels_BT != IGNORED).sum()
