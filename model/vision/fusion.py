"""Place the encoder's rows among the token embeddings.

Shapes: B batch, T sequence, D hidden size, N tiles, S side of a tile in pixels, M image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import DataError
from core.memory import upload
from model.vision.config import CHANNELS, VisionConfig


@dataclass(frozen=True)
class Images:
    """The tiles of a micro-batch and where their rows go.

    `tiles_N3SS`: normalised pixels or, with `greys`, grey levels in uint8, which may be on the host. `rows_BT`: for
    each position the number of the row of `encode` that replaces its embedding, or -1 for text. Row r belongs to tile
    r // Q, the tiles in the order of `tiles_N3SS`. `greys`: the normalised value of each grey level, on the device.
    """

    tiles_N3SS: Tensor
    rows_BT: Tensor
    greys: Tensor | None = None
    kept: list[Tensor] | None = None
    """The rows of these tiles are kept here when they are encoded, and taken from here if they already were."""

    def encode(self, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the encoder's rows, [M, D]."""
        return self.deliver(self.rows(lambda: encoder(self.normalised(self.tiles_N3SS))))

    def rows(self, encode: Callable[[], Tensor]) -> Tensor:
        """Return the rows of all tiles of this rank: those that are kept, or the result of `encode`."""
        if self.kept:
            return self.kept[0]
        rows_MD = encode()
        if self.kept is not None:
            self.kept.append(rows_MD)
        return rows_MD

    def normalised(self, tiles_N3SS: Tensor) -> Tensor:
        """Return pixels for the encoder, on the device."""
        return tiles_N3SS if self.greys is None else self.greys[upload(tiles_N3SS, self.greys.device).int()]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are not on the host."""
        return [x for x in vars(self).values() if isinstance(x, Tensor) and x.device.type != "cpu"]

    def deliver(self, rows_MD: Tensor) -> Tensor:
        """Return the rows that `rows_BT` numbers, from the rows of all tiles."""
        return rows_MD


@dataclass(frozen=True, kw_only=True)
class EncodedImages(Images):
    """Images whose rows have been encoded before."""

    rows_MD: Tensor

    def encode(self, encoder: Callable[[Tensor], Tensor] | None) -> Tensor:
        return self.rows_MD


def no_images(config: VisionConfig, x_BTD: Tensor) -> Images:
    """Return the images of a micro-batch without any, whose embeddings are `x_BTD`."""
    side = config.tile_size
    tiles = torch.zeros(0, CHANNELS, side, side, device=x_BTD.device)
    return Images(tiles, torch.full(x_BTD.shape[:2], -1, device=x_BTD.device))


def images_of(config: VisionConfig, tokens_BT: Tensor, tiles_N3SS: Tensor) -> Images:
    """Assign the rows of `tiles_N3SS` to the placeholders in `tokens_BT`, in row-major order.

    Raises `DataError` unless the numbers of both are equal, or if the tiles have another size.
    """
    if tiles_N3SS.shape[1:] != (CHANNELS, config.tile_size, config.tile_size):
        wanted = f"[N, {CHANNELS}, {config.tile_size}, {config.tile_size}]"
        raise DataError(f"the tiles have the shape {list(tiles_N3SS.shape)}, but the model needs {wanted}")
    is_image_BT = tokens_BT == config.image_token_id
    found, expected = int(is_image_BT.sum()), len(tiles_N3SS) * config.tokens_per_tile
    if found != expected:
        tiles = f"{len(tiles_N3SS)} tiles of {config.tokens_per_tile} tokens = {expected}"
        raise DataError(f"the sequences have {found} placeholders (id {config.image_token_id}), but there are {tiles}")
    return Images(tiles_N3SS, placeholder_rows(is_image_BT))


def placeholder_rows(is_image_BT: Tensor) -> Tensor:
    """Number the placeholders in row-major order, for `Images.rows_BT`; -1 elsewhere."""
    numbers_BT = (is_image_BT.flatten().cumsum(0) - 1).view_as(is_image_BT)
    return torch.where(is_image_BT, numbers_BT, -1)


def place(x_BTD: Tensor, rows_MD: Tensor, rows_BT: Tensor) -> Tensor:
    """Replace the embeddings at positions with `rows_BT` >= 0 by the rows of these numbers.

    A lookup, because its backward pass is deterministic and that of an index is not. Text looks up an added row of
    zeros, so that the encoder's graph is reached without images too.
    """
    padded_MD = F.pad(rows_MD, (0, 0, 0, 1))
    chosen_BTD = F.embedding(torch.where(rows_BT < 0, len(rows_MD), rows_BT), padded_MD)
    return torch.where((rows_BT < 0)[..., None], x_BTD, chosen_BTD.to(x_BTD.dtype))
