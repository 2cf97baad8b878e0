"""The engine of contrastive training: the loss compares all pairs of the global batch.

Shapes: B pairs of this rank, T sequence, S side of a tile in pixels, E feature size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from core.memory import upload
from data.images.tiles import GREYS
from data.loader import Batch
from parallel.fsdp import reduce_within_step
from parallel.vision.towers import ParallelTowers
from train.contrastive.config import ContrastiveLoss
from train.contrastive.grad_cache import backward_in_parts
from train.contrastive.loss import contrastive_loss
from train.engine.fsdp import InPlaceEngine
from train.engine.images import load_tiles
from train.optim.config import OptimizerConfig


@dataclass(frozen=True)
class PairTokens:
    """The token ids that tell a caption from its picture: those that stand for pictures, and EOS, which ends it."""

    pictures: tuple[int, ...]
    eos: int

    def captions(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the captions of sequences of one pair each, and the index of each caption's EOS. All sequences have
        the same number of tokens for their picture, which are taken out.
        """
        is_text_BT = ~torch.isin(tokens_BT, torch.tensor(self.pictures))
        texts_BT = tokens_BT[is_text_BT].view(len(tokens_BT), -1)
        return texts_BT, (texts_BT == self.eos).int().argmax(1)


@dataclass(frozen=True)
class PairBatch:
    """Image-caption pairs of a micro-batch, on the device: grey levels in uint8, tokens, and the index of each
    caption's last token.
    """

    tiles_B3SS: Tensor
    texts_BT: Tensor
    last_B: Tensor


def pair_batches(batch: Batch, ids: PairTokens, placed: ParallelTowers, micro_batch_size: int) -> Iterator[PairBatch]:
    """Yield the micro-batches of a batch of sequences of one pair each, and decode its pictures if need be."""
    assert batch.images is not None
    if not batch.images.pixels:
        load_tiles(batch.images, placed.meshes, micro_batch_size)
    texts_BT, last_B = ids.captions(batch.tokens_BT)
    sides = batch.images.pixels, texts_BT.split(micro_batch_size), last_B.split(micro_batch_size)
    for one in zip(*sides, strict=True):
        yield PairBatch(*(upload(side, placed.device) for side in one))


def features(placed: ParallelTowers, pairs: PairBatch) -> tuple[Tensor, Tensor]:
    """Return the features of images and of captions, both [B, E]."""
    pixels_B3SS = upload(torch.tensor(GREYS), placed.device)[pairs.tiles_B3SS.int()]
    towers = placed.model
    return towers.image_features(pixels_B3SS), towers.text_features(pairs.texts_BT, pairs.last_B)


class ContrastiveEngine(InPlaceEngine):
    """Trains contrastive towers by GradCache over a rank's micro-batches. Features are compared with those of all ranks
    and micro-batches.
    """

    placed: ParallelTowers

    def __init__(
        self, placed: ParallelTowers, optimizer: OptimizerConfig, loss: ContrastiveLoss, ids: PairTokens
    ) -> None:
        super().__init__(placed, optimizer)
        self.loss, self.ids = loss, ids

    def forward_backward(self, batch: Batch, micro_batch_size: int) -> Tensor:
        """Compute the gradients of this rank's pairs. Returns the loss of the global batch, the same on every rank."""
        pairs = list(pair_batches(batch, self.ids, self.placed, micro_batch_size))
        towers, layout = self.placed.model, self.meshes.layout

        def encode(part: PairBatch) -> tuple[Tensor, Tensor]:
            if torch.is_grad_enabled():
                for tower in (towers.text, towers.vision):
                    reduce_within_step(tower, layout, part is pairs[-1])
            return features(self.placed, part)

        total = backward_in_parts(pairs, encode, self._loss).double()
        self.complete_gradients()
        self.meshes.world.sum(total, "loss")
        return total

    def step(self, learning_rate_factor: float) -> None:
        super().step(learning_rate_factor)
        self.placed.model.limit_scale()

    def _loss(self, images_BE: Tensor, texts_BE: Tensor) -> Tensor:
        towers = self.placed.model
        return contrastive_loss(self.loss, images_BE, texts_BE, towers.log_scale, towers.bias, self.meshes.dp)
