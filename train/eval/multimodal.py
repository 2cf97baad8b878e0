"""Turn the questions about pictures of the evaluation harness into tokens and tiles.

`<image>` in a question's text stands for the next of its pictures. As in training, each text between pictures is
tokenised by itself.

Shapes: B sequences, T tokens, N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError
from data.images.decode import BadImage
from data.images.media import ImageDescription
from data.images.tiles import GREYS
from model.vision.fusion import Images
from train.eval.pictures import prompt_rows

PLACEHOLDER = "<image>"
_PLAIN = ("RGB", "RGBA", "L", "LA", "P", "1", "I", "I;16")
"""Modes of Pillow that PNG has."""


@dataclass(frozen=True)
class TokenizedQuestion:
    """`ids`: tokens of the pictures and the texts before the last picture's end. `last`: the text after it.
    `pixels_N3SS`: the tiles, uint8; None without pictures.
    """

    ids: list[int]
    last: str
    pixels_N3SS: Tensor | None


def question(
    text: str, visuals: Any, images: ImageDescription | None, encode: Callable[[str], Sequence[int]]
) -> TokenizedQuestion:
    """Put the pictures of a question where its text says. Raises `ConfigError` (key `tasks`).

    `visuals`: a picture or a list, each a Pillow image, bytes, or {"bytes": ...} as parquet has it. `images`: how
    pictures become tokens and tiles.
    """
    found, texts = _flat(visuals), text.split(PLACEHOLDER)
    if found and images is None:
        raise ConfigError("tasks", None, "ask about pictures, which the model has no tokens or no encoder for")
    if len(texts) - 1 != len(found):
        reason = f"a question has {len(found)} pictures, but {len(texts) - 1} times {PLACEHOLDER} in its text"
        if len(texts) - 1 > len(found):
            reason += " (examples of few_shot cannot have pictures)"
        raise ConfigError("tasks", None, f"{reason}: {text[:80]!r}")
    ids: list[int] = []
    pixels = []
    for place, (before, visual) in enumerate(zip(texts, found, strict=False)):
        assert images is not None
        try:
            placeholders, tiles_N3SS = images.read_picture(_content(visual), f"picture {place}")
        except BadImage as error:
            raise ConfigError("tasks", None, f"{error} (question: {text[:80]!r})") from None
        ids += [*encode(before), *placeholders]
        pixels.append(tiles_N3SS)
    return TokenizedQuestion(ids, texts[-1], torch.from_numpy(np.concatenate(pixels)) if pixels else None)


def place_tiles(
    tokens_BT: Tensor, pixels_N3SS: Tensor, placeholder: int, device: torch.device, length: int | None = None
) -> Images:
    """Assign tiles to the placeholders in the first `length` tokens of each sequence, in row-major order."""
    rows_BT = prompt_rows(tokens_BT, placeholder, length).to(device)
    return Images(pixels_N3SS.to(device), rows_BT, torch.tensor(GREYS, device=device))


def _flat(visuals: Any) -> list[Any]:
    """Return the pictures of a question in one list. A column of a task may hold a list of them."""
    if not isinstance(visuals, list | tuple):
        return [] if visuals is None else [visuals]
    return [one for part in visuals for one in _flat(part)]


def _content(visual: Any) -> bytes:
    """Return the bytes of a picture file."""
    if isinstance(visual, dict):
        visual = visual.get("bytes")
    if isinstance(visual, bytes):
        return visual
    if not hasattr(visual, "save"):
        raise ConfigError("tasks", None, "a question's picture has no bytes: store pictures in the task's data")
    file = io.BytesIO()
    (visual if visual.mode in _PLAIN else visual.convert("RGB")).save(file, "PNG")
    return file.getvalue()
