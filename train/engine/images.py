"""Give the model the images of a batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from data.images.batch import BatchImages
from data.images.tiles import GREYS
from model.vision.fusion import Images
from parallel.mesh import Meshes
from parallel.parallelize import ParallelModel
from parallel.vision.exchange import tile_share


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


def image_positions(placed: ParallelModel, images: BatchImages) -> Tensor:
    """Return which positions of this rank show an image, for `ForwardContext.is_image_BT`: bool [B, T], where T is this
    rank's part of the sequence after the splits of cp and tp.
    """
    tp, share = placed.meshes.tp, placed.context_shard(images.rows_BT.shape[1])
    return (share.take(images.rows_BT) >= 0).chunk(tp.size, 1)[tp.rank].to(placed.device)


def load_tiles(images: BatchImages | None, meshes: Meshes, micro_batch_size: int) -> None:
    """Decode the tiles that this rank encodes, of each micro-batch."""
    if images is not None:
        assert images.decode is not None
        images.load(images.decode, micro_batch_size, images.side, partial(tile_share, meshes))
