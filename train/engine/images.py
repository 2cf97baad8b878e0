"""Give the model the images of a batch."""

from __future__ import annotations

import torch

from data.images.batch import BatchImages
from data.images.tiles import GREYS
from model.vision.fusion import Images
from parallel.parallelize import ParallelModel


def batch_images(placed: ParallelModel, images: BatchImages | None, micro_batch_size: int) -> list[Images | None]:
    """Return the images of each micro-batch of a batch whose pixels `BatchImages.load` has decoded: for
    `ForwardContext.images`. Empty if the batch has no images, or if this rank has no vision encoder.
    """
    if images is None or placed.model.vision is None:
        return []
    greys = torch.tensor(GREYS, device=placed.device)
    return [
        placed.images(rows_BT, len(tiles), pixels_N3SS, greys)
        for (rows_BT, tiles), pixels_N3SS in zip(images.micro_batches(micro_batch_size), images.pixels, strict=True)
    ]
