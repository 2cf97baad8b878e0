"""Contrastive losses over all data-parallel ranks.

Each rank encodes its own pairs and compares them with the features of all ranks. A loss is a sum over the rank's rows
divided by the number of pairs of the global batch, so it is this rank's part: the parts, and the gradients that they
give to the weights, are summed over the ranks. The gathered features carry gradients back to the ranks that computed
them. Without these, a rank would miss what its features do to the rows of others.

Shapes: B pairs of this rank, G pairs of all ranks, E feature size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.comm.collectives import all_gather
from parallel.mesh import MeshAxis

PURPOSE = "contrastive features"


class ContrastiveLoss(Enum):
    info_nce = "info_nce"
    """Cross-entropy of a pair's logit among all captions, and among all images; the mean of both (Radford et al. 2021,
    arXiv 2103.00020, figure 3).
    """
    siglip = "siglip"
    """A binary decision for each image and caption whether they are a pair (Zhai et al. 2023, arXiv 2303.15343)."""

    @property
    def first(self) -> FirstLogits:
        """The initial log-scale and bias."""
        match self:
            case ContrastiveLoss.info_nce:
                return FirstLogits(math.log(1 / 0.07), 0.0)
            case ContrastiveLoss.siglip:
                return FirstLogits(math.log(10), -10.0)


@dataclass(frozen=True)
class FirstLogits:
    """Initial values of the parameters that turn cosines into logits."""

    log_scale: float
    bias: float


def contrastive_loss(
    kind: ContrastiveLoss, images_BE: Tensor, texts_BE: Tensor, log_scale: Tensor, bias: Tensor, axis: MeshAxis
) -> Tensor:
    """Return this rank's part of the loss. Features have unit length; every rank of `axis` has as many pairs."""
    pairs_G2E = all_gather(torch.stack([images_BE, texts_BE], 1), axis, 0, PURPOSE)
    images_GE, texts_GE = pairs_G2E.unbind(1)
    local, total = len(images_BE), len(pairs_G2E)
    own_B = torch.arange(axis.rank * local, (axis.rank + 1) * local, device=images_BE.device)
    scale = log_scale.exp()
    match kind:
        case ContrastiveLoss.info_nce:  # a bias would change no softmax
            to_texts = F.cross_entropy(scale * images_BE @ texts_GE.T, own_B, reduction="sum")
            to_images = F.cross_entropy(scale * texts_BE @ images_GE.T, own_B, reduction="sum")
            return (to_texts + to_images) / (2 * total)
        case ContrastiveLoss.siglip:
            signs_BG = 2.0 * (torch.arange(total, device=own_B.device) == own_B[:, None]) - 1
            return -F.logsigmoid(signs_BG * (scale * images_BE @ texts_GE.T + bias)).sum() / total
