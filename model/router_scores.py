"""All formulas that depend on the router's score function. A new member of `Score` needs a case in each function.

Shapes: B batch, T sequence, E experts.
"""

from __future__ import annotations

from typing import assert_never

import torch.nn.functional as F
from torch import Tensor

from model.config import RouterConfig, Score


def scores(router: RouterConfig, logits_BTE: Tensor) -> Tensor:
    """Return the routing weight of each expert before top-k selection."""
    match router.score:
        case Score.sigmoid:
            return logits_BTE.sigmoid()
        case Score.softmax:
            return logits_BTE.softmax(-1)
        case _:
            assert_never(router.score)


def grows_with_top_k(router: RouterConfig) -> bool:
    """Return whether the sum of a token's routing weights grows with the number of experts that it chooses."""
    return {Score.sigmoid: not router.norm_topk_prob, Score.softmax: False}[router.score]


def log_probabilities(router: RouterConfig, logits_BTE: Tensor, log_softmax_BTE: Tensor) -> Tensor:
    """Return the logarithm of the scores normalised to a sum of 1. `log_softmax_BTE`: log-softmax of the logits."""
    match router.score:
        case Score.sigmoid:
            return F.logsigmoid(logits_BTE).log_softmax(-1)
        case Score.softmax:
            return log_softmax_BTE
        case _:
            assert_never(router.score)


def aux_loss(router: RouterConfig, logits_BTE: Tensor, load_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over tokens of sum_e load_e p_e, and its gradient [B, T, E] with respect to the logits z.

    p are the scores normalised to a sum of 1. Softmax: dp_e/dz_j = p_e (1[e=j] - p_j). Sigmoid s: p = s / sum(s)
    (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).
    """
    load_B1E = load_BE[:, None]
    match router.score:
        case Score.sigmoid:
            s = logits_BTE.sigmoid()
            total = s.sum(-1, keepdim=True)
            mean = (s * load_B1E).sum(-1, keepdim=True) / total
            return mean.sum(), (load_B1E - mean) / total * s * (1 - s)
        case Score.softmax:
            p = logits_BTE.softmax(-1)
            mean = (p * load_B1E).sum(-1, keepdim=True)
            return mean.sum(), p * (load_B1E - mean)
        case _:
            assert_never(router.score)
