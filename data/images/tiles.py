"""Cut a picture into Llama 4's tiles: bilinear with antialias by Pillow, padded with black on the right and bottom.

Shapes: N tiles, S side of a tile in pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data.images.canvas import Canvas, TileConfig, best_canvas, resized


def tiles(picture: Any, config: TileConfig) -> tuple[Canvas, Any]:
    """Return the canvas of an RGB picture of Pillow and its tiles, uint8 [N, 3, S, S].

    Tiles are ordered by rows. If there are several, the last is the whole picture at the size of one tile; its aspect
    is not kept.
    """
    if picture.mode != "RGB":
        raise ValueError(f"the mode is {picture.mode}, but must be RGB")
    width, height = picture.size
    canvas, side = best_canvas(height, width, config), config.tile_size
    found = np.zeros((canvas.tiles, 3, side, side), np.uint8)
    board = np.zeros((canvas.rows * side, canvas.columns * side, 3), np.uint8)
    high, wide = resized(height, width, config)
    board[:high, :wide] = _scaled(picture, high, wide)
    grid = board.reshape(canvas.rows, side, canvas.columns, side, 3).transpose(0, 2, 4, 1, 3)
    found[: canvas.rows * canvas.columns] = grid.reshape(-1, 3, side, side)
    if canvas.tiles > 1:
        found[-1] = _scaled(picture, side, side).transpose(2, 0, 1)
    return canvas, found


def _scaled(picture: Any, height: int, width: int) -> Any:
    """Return a picture resized along the rows, rounded to whole greys, and then along the columns.

    In one call Pillow 13 and later begin with the columns of tall pictures. Earlier ones and torch do not, and up to a
    fifth of the values would differ by a grey level.
    """
    from PIL import Image

    rows = picture.resize((width, picture.height), Image.Resampling.BILINEAR)
    return np.asarray(rows.resize((width, height), Image.Resampling.BILINEAR))


def bfloat16(values: Any) -> Any:
    """Round finite float32 values to the nearest bfloat16, ties to even, and return them as float32."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _greys() -> Any:
    """Return v / 255, minus 0.5, divided by 0.5, rounded to bfloat16 after each operation as transformers does."""
    scaled = bfloat16(np.arange(256, dtype=np.float32) * np.float32(1 / 255))
    table = bfloat16(bfloat16(scaled - np.float32(0.5)) / np.float32(0.5))
    table.flags.writeable = False
    return table


GREYS = _greys()
"""Normalised value of each grey level, float32 [256]. Black is -1. Each is a number of bfloat16: a float32 table would
differ by up to half a grey level from what transformers feeds.
"""


def normalise(tiles: Any) -> Any:
    """Return float32 pixels of uint8 tiles, in the same shape."""
    return GREYS.take(tiles)  # half the time of indexing
