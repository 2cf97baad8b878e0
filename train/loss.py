"""Compute the language-model loss as a sum over tokens, divided by the global number of tokens.

Shapes: B batch, T sequence, M modalities: documents with images, and of text alone.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from core.memory import upload
from data.images.batch import MODALITIES
from data.loader import IGNORED, Batch
from parallel.context_parallel import ContextShard
from parallel.mesh import Meshes


class BatchLoss:
    """The mean loss over the labelled tokens of a global batch. Call it for each micro-batch, in order.

    In data with images it also sums the losses of each modality. They travel with the loss: this adds no collective and
    waits for nothing.
    """

    def __init__(
        self, batch: Batch, labels_BT: Tensor, share: ContextShard, micro_batch_size: int, meshes: Meshes
    ) -> None:
        self.meshes, self.masks, counted_BT = meshes, deque[Tensor](), labels_BT != IGNORED
        tokens = counted_BT.sum() * meshes.counts_tokens
        if batch.images is not None:
            with_images_BT = upload(
                share.take(batch.images.documents_with_images(batch.positions_BT)), labels_BT.device
            )
            masks_BMT = torch.stack([with_images_BT, ~with_images_BT], 1)
            self.masks.extend(masks_BMT.split(micro_batch_size))
            tokens_M = (masks_BMT & counted_BT[:, None]).sum((0, 2)) * meshes.counts_tokens
            tokens = torch.cat([tokens[None], tokens_M])
            self.nats_M = torch.zeros(len(MODALITIES), dtype=torch.float64, device=labels_BT.device)
        meshes.world.sum(tokens, "loss")
        self.tokens = tokens  # of the global batch, followed by those of each modality

    def __call__(self, losses_BT: Tensor) -> Tensor:
        """Return the part of the loss that is due to a micro-batch on this rank, given the losses of its tokens."""
        tokens = self.tokens
        if tokens.dim():
            tokens = tokens[0]
            self.nats_M += (losses_BT.detach()[:, None] * self.masks.popleft()).sum((0, 2), dtype=torch.float64)
        return losses_BT.sum() / tokens.clamp_min(1)  # a batch of one-token documents has no labels

    def reduce(self, total: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the parts of this rank, `total`, over all ranks. Return the loss, and that of each modality in data with
        images: NaN for one without labelled tokens. All are scalars on the device.
        """
        is_counted = self.meshes.tp.rank == 0
        if self.tokens.dim() == 0:
            total = total * is_counted
            self.meshes.world.sum(total, "loss")
            return total, {}
        sums = torch.cat([total[None], self.nats_M]) * is_counted
        self.meshes.world.sum(sums, "loss")
        return sums[0], dict(zip(MODALITIES, (sums[1:] / self.tokens[1:]).unbind(), strict=True))
