"""The loss of a block of logits, and its PyTorch twin: running sums over the words, and the gradient.

Shapes: T tokens, W words of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from precision.gemm import at_least_float32


class LossSums(NamedTuple):
    """Sums over the words that were seen so far, for each token, in at least float32."""

    largest_T: Tensor
    """The largest logit."""
    exponentials_T: Tensor
    """The sum of exp(logit - largest)."""
    label_T: Tensor
    """The logit of the label; 0 if its word was not seen."""
    likeliest_T: Tensor | None
    """The id of the word with the largest logit, the first of equals, int64; None: not wanted."""

    @classmethod
    def empty(cls, labels_T: Tensor, dtype: torch.dtype, likeliest: bool = False) -> LossSums:
        wide = at_least_float32(dtype)
        zeros = torch.zeros(2, len(labels_T), dtype=wide, device=labels_T.device)
        largest_T = torch.full_like(zeros[0], -torch.inf)
        return cls(largest_T, zeros[0], zeros[1], torch.zeros_like(labels_T) if likeliest else None)

    def of(self, tokens: slice) -> LossSums:
        """Return the sums of some tokens, which share the memory of these."""
        return LossSums(*(None if x is None else x[tokens] for x in self))  # type: ignore[arg-type]


class LossKernels:
    """PyTorch operations."""

    def add(self, sums: LossSums, logits_TW: Tensor, labels_T: Tensor, first: int) -> None:
        """Add a block of words, of which the first has the id `first`, to the sums. Overwrites the logits."""
        wide_TW = logits_TW.to(at_least_float32(logits_TW.dtype))
        places_T1, here_T = _places(labels_T, first, wide_TW.shape[1])
        sums.label_T.add_(wide_TW.gather(1, places_T1)[:, 0] * here_T)
        if sums.likeliest_T is None:
            largest_T = wide_TW.amax(1)
        else:
            largest_T, words_T = wide_TW.max(1)
            sums.likeliest_T.copy_(torch.where(largest_T > sums.largest_T, words_T + first, sums.likeliest_T))
        largest_T = torch.maximum(largest_T, sums.largest_T)
        sums.exponentials_T.mul_((sums.largest_T - largest_T).exp_())
        sums.exponentials_T.add_(wide_TW.sub_(largest_T[:, None]).exp_().sum(1))
        sums.largest_T.copy_(largest_T)

    def gradient(self, logits_TW: Tensor, lse_T: Tensor, grad_T: Tensor, labels_T: Tensor, first: int) -> Tensor:
        """Return the gradient grad * (softmax - 1 at the label) of a block of logits in their dtype. Overwrites the
        logits. `lse_T`: their log-sum-exp over all words.
        """
        wide_TW = logits_TW.to(at_least_float32(logits_TW.dtype))
        places_T1, here_T = _places(labels_T, first, wide_TW.shape[1])
        gradient_TW = wide_TW.sub_(lse_T[:, None]).exp_()
        gradient_TW.scatter_add_(1, places_T1, -here_T[:, None].to(gradient_TW.dtype))
        return gradient_TW.mul_(grad_T[:, None]).to(logits_TW.dtype)


def _places(labels_T: Tensor, first: int, words: int) -> tuple[Tensor, Tensor]:
    """Return the places of labels in a block [T, 1], clamped, and whether they are in it [T]. Ignored labels, which are
    negative, are in none.
    """
    places_T = labels_T - first
    return places_T.clamp(0, words - 1)[:, None], (places_T >= 0) & (places_T < words)
