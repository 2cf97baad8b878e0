"""Pictures before a prompt: their token ids and tiles.

Shapes: B sequences, T tokens, N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError
from core.files import read_json
from data.images.config import ImagesConfig, TileConfig
from data.images.contents import RefusedRecord, read_inside
from data.images.decode import BadImage
from data.images.media import ImageDescription, ImageSpelling
from model.config import ModelConfig
from model.huggingface.vision import PROCESSOR_FILES, processor_files
from model.vision.fusion import placeholder_rows

LARGEST_BYTES = 64 * 2**20
_NAMES = ("image_processor_type", "processor_class")
"""Keys of a processor's file that change no pixels."""


@dataclass(frozen=True)
class PicturePrompt:
    """`ids`: the tokens that stand for the pictures. `pixels_N3SS`: all of their tiles, uint8."""

    ids: list[int]
    pixels_N3SS: Tensor
    placeholder: int
    rows_kept: list[Tensor] = field(default_factory=list)
    """The encoder's rows, once a token was generated."""

    def rows(self, tokens_BT: Tensor) -> Tensor:
        """Return the encoder row of each placeholder in a sequence that begins with BOS and `ids`; -1 elsewhere."""
        return prompt_rows(tokens_BT, self.placeholder, 1 + len(self.ids))


def prompt_rows(tokens_BT: Tensor, placeholder: int, length: int | None) -> Tensor:
    """Return the encoder row of each placeholder in the first `length` tokens (None: all), in row-major order; -1
    elsewhere: a model may generate the token.
    """
    is_picture_BT = tokens_BT == placeholder
    if length is not None:
        is_picture_BT[:, length:] = False
    return placeholder_rows(is_picture_BT)


def picture_prompt(paths: Sequence[str], model: ModelConfig, images: ImageDescription | None) -> PicturePrompt:
    """Read pictures for a model. `images`: how they become tiles and tokens. Raises `ConfigError`."""
    if model.vision is None:
        raise ConfigError("image", paths[0], "the model has no vision encoder")
    if images is None:
        raise ConfigError(
            "image", paths[0], "the run was trained without pictures: its tokenizer has no tokens for them"
        )
    ids: list[int] = []
    pixels = []
    for path in paths:
        place = Path(path).expanduser()
        if not place.exists():
            raise ConfigError("image", path, "no such file" if "://" not in path else "is a URL: nothing is fetched")
        try:
            part = read_inside(place.parent, place.name, LARGEST_BYTES)
            placeholders, found = images.read_picture(part, path)
        except (RefusedRecord, BadImage) as error:
            raise ConfigError("image", path, str(error)) from None
        ids += placeholders
        pixels.append(found)
    return PicturePrompt(ids, torch.from_numpy(np.concatenate(pixels)), images.ids.patch)


def exported_images(
    directory: Path, model: ModelConfig, special_id: Callable[[str], int | None]
) -> ImageDescription | None:
    """Return how pictures become tiles and tokens in a model in the Hugging Face format, by its processor's files.

    Raises `ConfigError` for a processor that gives other pixels than ours. Without a file it is that of Llama 4.
    """
    if model.vision is None:
        return None
    path, settings = directory / PROCESSOR_FILES[0], {}
    if path.exists():
        settings = read_json(path, {"max_patches?": int, "resize_to_max_canvas?": bool})
    most, enlarge = settings.get("max_patches", 16), settings.get("resize_to_max_canvas", False)
    for key, ours in processor_files(model.vision, most, enlarge)[PROCESSOR_FILES[0]].items():
        if key not in _NAMES and settings.get(key, ours) != ours:
            raise ConfigError(f"{path}: {key}", settings[key], f"must be {ours}: no other processor is supported")
    try:
        config = TileConfig(model.vision.tile_size, model.vision.patch_size, most, enlarge)
    except ConfigError as error:
        raise ConfigError(f"{path}: max_patches", most, error.reason) from None
    return ImageDescription.read(ImageSpelling(ImagesConfig(config), special_id).describe())
