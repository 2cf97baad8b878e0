"""Give the model the images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from core.memory import upload
from data.images.batch import BatchImages
from data.images.tiles import GREYS
from data.loader import Batch
from model.attention.plan import ForwardContext
from model.vision.fusion import Images
from parallel.mesh import Meshes
from parallel.parallelize import ParallelModel
from parallel.vision.ahead import EncodedStep
from parallel.vision.exchange import tile_share


def batch_images(placed: ParallelModel, images: BatchImages | None, micro_batch_size: int) -> list[Images | None]:
    """Return the images of each micro-batch of a batch whose pixels `load_tiles` has decoded: for
    `ForwardContext.images`. Those of all sequences together if they are encoded ahead (`ParallelModel.encode_ahead`).
    Empty if the batch has no images, or if this rank has no vision encoder. Copies pixels to the device.
    """
    if images is None or placed.model.vision is None:
        return []
    greys = upload(torch.tensor(GREYS), placed.device)
    return [
        placed.images(rows_BT, len(tiles), upload(pixels_N3SS, placed.device), greys, images.ranks)
        for (rows_BT, tiles), pixels_N3SS in zip(
            images.micro_batches(_together(images, placed.meshes, micro_batch_size)), images.pixels, strict=True
        )
    ]


def image_positions(placed: ParallelModel, images: BatchImages) -> Tensor:
    """Return which positions of this rank show an image, for `ForwardContext.is_image_BT`: bool [B, T], where T is this
    rank's part of the sequence after the splits of cp and tp.
    """
    tp, share = placed.meshes.tp, placed.context_shard(images.local_rows_BT.shape[1])
    return upload((share.take(images.local_rows_BT) >= 0).chunk(tp.size, 1)[tp.rank], placed.device)


def load_tiles(images: BatchImages | None, meshes: Meshes, micro_batch_size: int) -> None:
    """Decode the tiles that this rank encodes, of each micro-batch or, if they are encoded ahead, of all sequences."""
    if images is not None:
        assert images.decode is not None
        size = _together(images, meshes, micro_batch_size)
        images.load(images.decode, size, images.side, partial(tile_share, meshes, ranks=images.ranks))


def local_sequences(take: Callable[[int, int], Batch], meshes: Meshes, count: int, micro_batch_size: int) -> Batch:
    """Return this rank's `count` sequences of a global batch, of which `take` returns a range. If data-parallel ranks
    share tiles, its images are those of the whole global batch.
    """
    start = meshes.dp.rank * count
    if meshes.dp.size == 1 or not meshes.layout.vision.over_data_parallel:
        return take(start, start + count)
    whole = take(0, meshes.dp.size * count)
    batch = whole.slice(start, start + count)
    if whole.images is not None:
        size = count if meshes.layout.encodes_ahead else micro_batch_size
        batch.images = whole.images.interleaved(meshes.dp.size, size, meshes.dp.rank)
    return batch


def give_images(
    placed: ParallelModel, found: Sequence[Images | None], contexts: Sequence[ForwardContext]
) -> EncodedStep | None:
    """Give the images that `batch_images` found to the contexts of the micro-batches. Returns what encoded them if they
    are encoded ahead: call its `backward` after the backward passes of all micro-batches.
    """
    encoded = placed.encode_ahead(found[0] if found else None, len(contexts))
    if encoded is not None and found:
        found = [*encoded.micro_batches()]
    for context, shown in zip(contexts, found or [None] * len(contexts), strict=True):
        context.images = shown
    return encoded


def _together(images: BatchImages, meshes: Meshes, micro_batch_size: int) -> int:
    return len(images.tiles) if meshes.layout.encodes_ahead else micro_batch_size * images.ranks
