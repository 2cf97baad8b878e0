"""Contrastive losses over all data-parallel ranks.

Each rank encodes its own pairs and compares them with the features of all ranks. A loss is a sum over the rank's rows
divided by the number of pairs of the global batch, so it is this rank's part: the parts, and the gradients that they
give to the weights, are summed over the ranks. The gathered features carry gradients back to the ranks that computed
them. Without these, a rank would miss what its features do to the rows of others.

Shapes: B pairs of this rank, G pairs of all ranks, E feature size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.comm.collectives import all_gather
from parallel.mesh import MeshAxis
from train.contrastive.config import ContrastiveLoss

PURPOSE = "contrastive features"


def contrastive_loss(
    kind: ContrastiveLoss, images_BE: Tensor, texts_BE: Tensor, log_scale: Tensor, bias: Tensor | None, axis: MeshAxis
) -> Tensor:
    """Return this rank's part of the loss. Features have unit length; every rank of `axis` has as many pairs. `bias`:
    only SigLIP's.
    """
    pairs_G2E = all_gather(torch.stack([images_BE, texts_BE], 1), axis, 0, PURPOSE)
    images_GE, texts_GE = pairs_G2E.unbind(1)
    local, total = len(images_BE), len(pairs_G2E)
    own_B = torch.arange(axis.rank * local, (axis.rank + 1) * local, device=images_BE.device)
    scale = log_scale.exp()
    match kind:
        case ContrastiveLoss.info_nce:
            to_texts = F.cross_entropy(scale * images_BE @ texts_GE.T, own_B, reduction="sum")
            to_images = F.cross_entropy(scale * texts_BE @ images_GE.T, own_B, reduction="sum")
            return (to_texts + to_images) / (2 * total)
        case ContrastiveLoss.siglip:
            assert bias is not None
            signs_BG = 2.0 * (torch.arange(total, device=own_B.device) == own_B[:, None]) - 1
            return -F.logsigmoid(signs_BG * (scale * images_BE @ texts_GE.T + bias)).sum() / total
