"""Encode the tiles of a whole step before a pipeline runs, and compute the encoder's gradients after it.

The ranks of all stages share the tiles of their sequences equally. Before the pipeline, they encode them without
keeping activations, and send the rows to the ranks of the first stage, which have the positions. The micro-batches take
these rows as leaves of the graph. After the pipeline, the gradients of the rows are sent back, and each rank encodes
its tiles again, now with a graph, and runs the backward pass. So no stage waits for the encoder, and pipeline schedules
do not involve it. It costs one more forward pass of the encoder, as recomputation does.

FSDP2 gathers the encoder's parameters once for each of the two phases, and reduces its gradients once. So ranks may
encode different numbers of tiles at a time.

Shapes: N tiles, S side of a tile in pixels, B sequences, T tokens, Q image tokens per tile, M image tokens, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from core.memory import upload
from model.vision.config import CHANNELS
from model.vision.encoder import VisionEncoder
from model.vision.fusion import EncodedImages, Images
from parallel.fsdp import reduce_after, reshard


class EncodedStep:
    """The encoded images of a step. `images`: those of all its sequences, made by `exchange.spread`; None: no sequence
    of the batch has any. About as many tiles are encoded at a time as one of `micro_batches` has.
    """

    def __init__(self, encoder: VisionEncoder, images: Images | None, micro_batches: int, device: torch.device) -> None:
        self.encoder, self.images, self.device = encoder, images or _no_tiles(encoder, device), device
        self.is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
        tiles_N3SS, rows_BT = self.images.tiles_N3SS, self.images.rows_BT
        self._chunks = tiles_N3SS.split(max(1, -(-len(tiles_N3SS) // micro_batches)))
        self._rows_MD = self.images.rows(self._encode).requires_grad_(self.is_trained)
        self._received_MD = self.images.deliver(self._rows_MD)
        self._parts = rows_BT.chunk(micro_batches)
        counts = [len(part_BT[part_BT >= 0].unique()) for part_BT in self._parts]
        leaves = self._received_MD.detach().split(counts)  # rows are received in the order of the tiles
        self._leaves = [leaf_MD.requires_grad_(self.is_trained) for leaf_MD in leaves]

    @torch.no_grad()
    def _encode(self) -> Tensor:
        rows_MD = torch.cat([self.encoder(self.images.normalised(chunk)) for chunk in self._chunks])
        reshard(self.encoder)
        return rows_MD

    def micro_batches(self) -> Iterator[EncodedImages]:
        """Yield the images of each micro-batch."""
        start = 0
        for part_BT, leaf_MD in zip(self._parts, self._leaves, strict=True):
            numbers_BT = upload(torch.where(part_BT < 0, -1, part_BT - start), self.device)
            yield EncodedImages(self.images.tiles_N3SS[:0], numbers_BT, rows_MD=leaf_MD)
            start += len(leaf_MD)

    def backward(self) -> None:
        """Compute the encoder's gradients from those of the micro-batches' rows. All ranks must call it."""
        if not self.is_trained:
            return
        received_MD = torch.cat([_gradient(leaf_MD) for leaf_MD in self._leaves])
        (gradient_MD,) = torch.autograd.grad(self._received_MD, self._rows_MD, received_MD)
        sizes = [len(chunk) * self.encoder.config.tokens_per_tile for chunk in self._chunks]
        for number, (chunk, part_MD) in enumerate(zip(self._chunks, gradient_MD.split(sizes), strict=True), 1):
            reduce_after(self.encoder, number == len(sizes))
            self.encoder(self.images.normalised(chunk)).backward(part_MD)


def _gradient(leaf_MD: Tensor) -> Tensor:
    if not len(leaf_MD):  # perhaps this rank is not of the first stage, and no backward pass reached it
        return leaf_MD.detach()
    assert leaf_MD.grad is not None
    return leaf_MD.grad


def _no_tiles(encoder: VisionEncoder, device: torch.device) -> Images:
    side = encoder.config.tile_size
    return Images(torch.zeros(0, CHANNELS, side, side, device=device), torch.zeros(1, 0, dtype=torch.int64))
