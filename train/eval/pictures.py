"""Pictures before a prompt: their token ids and tiles.

Shapes: B sequences, T tokens, N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError
from data.images.canvas import TileConfig
from data.images.config import ImagesConfig
from data.images.contents import RefusedRecord, read_inside
from data.images.decode import decode
from data.images.media import BadMediaError, EncodedPicture, ImageSpelling, spell
from data.images.parts import ImagePart
from data.images.tiles import tiles
from model.config import ModelConfig

LARGEST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PicturePrompt:
    """`ids`: the tokens that stand for the pictures. `pixels_N3SS`: all of their tiles, uint8."""

    ids: list[int]
    pixels_N3SS: Tensor
    placeholder: int

    def rows(self, tokens_BT: Tensor) -> Tensor:
        """Return the encoder row of each placeholder in a sequence that begins with BOS and `ids`; -1 elsewhere."""
        is_picture_BT = tokens_BT == self.placeholder
        is_picture_BT[:, 1 + len(self.ids) :] = False  # a model may generate the token
        return torch.where(is_picture_BT, is_picture_BT.flatten().cumsum(0).view_as(tokens_BT) - 1, -1)


def picture_prompt(
    paths: Sequence[str], model: ModelConfig, images: ImagesConfig | None, special_id: Callable[[str], int | None]
) -> PicturePrompt:
    """Read pictures for a model. `images`: the settings of its run; None: Llama 4's. Raises `ConfigError`."""
    vision = model.vision
    if vision is None:
        raise ConfigError("image", paths[0], "the model has no vision encoder")
    if images is None:
        images = ImagesConfig(TileConfig(vision.tile_size, vision.patch_size))
    spelling = ImageSpelling(replace(images, max_images=len(paths)), special_id)
    found = []
    for path in paths:
        place = Path(path).expanduser()
        if not place.exists():
            raise ConfigError("image", path, "no such file" if "://" not in path else "is a URL: nothing is fetched")
        try:
            part = ImagePart(read_inside(place.parent, place.name, LARGEST_BYTES), path)
            found += spelling.pieces([part], None)
        except (RefusedRecord, BadMediaError) as error:
            raise ConfigError("image", path, str(error)) from None
    ids, _ = spell(found, iter(()), spelling)
    pictures = [one for one in found if isinstance(one, EncodedPicture)]
    pixels = [tiles(decode(one.data, one.name, images.largest_pixels), images.tiles)[1] for one in pictures]
    return PicturePrompt(ids.tolist(), torch.from_numpy(np.concatenate(pixels)), spelling.ids.patch)
