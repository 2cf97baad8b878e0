"""Choose the grid of tiles that holds a picture, and the tokens that stand for it in a document.

Llama 4's rules in the float formats in which transformers computes them: in others some pictures would be a pixel
smaller or larger. A picture is never enlarged beyond one tile, unless `resize_to_max_canvas` is on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from data.images.config import TileConfig

_MEMORY = 2**16
"""Sizes, and strings of tokens, that are remembered."""


@dataclass(frozen=True)
class Canvas:
    """A grid of tiles."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """Number of tiles, the global tile included: a picture of several tiles has one, after the others."""
        return self.rows * self.columns + (self.rows * self.columns > 1)


@dataclass(frozen=True)
class ImageTokens:
    """Token ids that stand for a picture in a document."""

    start: int
    end: int
    image: int
    """Precedes the global tile, or the only one."""
    patch: int
    """The placeholder that an encoded token replaces."""
    tile_x: int
    """Separates the tiles of a row."""
    tile_y: int
    """Ends a row of tiles."""


@lru_cache(maxsize=_MEMORY)
def best_canvas(height: int, width: int, config: TileConfig) -> Canvas:
    """Return the canvas for a picture: the one that enlarges it least, or, if none is large enough, that shrinks it
    least; of those the smallest. With `resize_to_max_canvas`: that enlarges it most.
    """
    grids = _grids(config.max_tiles)
    scales = (np.float32(config.tile_size) * grids.astype(np.float32) / np.array([height, width], np.float32)).min(1)
    enlarging = scales[scales >= 1]
    if len(enlarging):
        chosen = enlarging.max() if config.resize_to_max_canvas else enlarging.min()
    else:
        chosen = scales.max()
    equal = grids[scales == chosen]
    rows, columns = equal[equal.prod(1).argmin()].tolist()
    return Canvas(rows, columns)


@lru_cache(maxsize=8)
def _grids(max_tiles: int) -> Any:
    """Return the rows and columns of every grid of at most this many tiles, [grids, 2]."""
    return np.array([(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)], np.int64)


@lru_cache(maxsize=_MEMORY)
def resized(height: int, width: int, config: TileConfig) -> tuple[int, int]:
    """Return the height and width that a picture has on its canvas: its aspect is kept, rounded down.

    Like transformers, divide in float32 where the canvas limits a side and in float64 where it does not. The results
    may differ by one pixel.
    """
    canvas = best_canvas(height, width, config)
    limits, scales = [], []
    for side, tiles in ((height, canvas.rows), (width, canvas.columns)):
        most, wanted = tiles * config.tile_size, max(side, config.tile_size)
        limited = config.resize_to_max_canvas or most < wanted
        number: Any = np.float32 if limited else float
        limits.append(most if limited else wanted)
        scales.append(number(limits[-1]) / number(side))
    (high, wide), (by_height, by_width) = limits, scales
    compared: Any = float if isinstance(by_height, float) and isinstance(by_width, float) else np.float32
    if compared(by_width) < compared(by_height):
        high = min(math.floor(type(by_width)(height) * by_width), high)
    else:
        wide = min(math.floor(type(by_height)(width) * by_height), wide)
    return max(high, 1), max(wide, 1)


def placeholder_length(canvas: Canvas, tokens_per_tile: int) -> int:
    """Return how many tokens stand for a picture: 147 for one tile of Llama 4, 147 + 145 n for n > 1 tiles."""
    several = canvas.rows * canvas.columns if canvas.tiles > 1 else 0
    return several * (tokens_per_tile + 1) + tokens_per_tile + 3


@lru_cache(maxsize=1024)
def placeholder_ids(canvas: Canvas, tokens_per_tile: int, ids: ImageTokens) -> Any:
    """Return the token ids that stand for a picture, a read-only array of int64 that callers share.

    start, then for several tiles the patches of each tile with `tile_x` between the tiles of a row and `tile_y` after
    each row, then `image` with the patches of the global or only tile, then end.
    """
    patches = [ids.patch] * tokens_per_tile
    found = [ids.start]
    if canvas.tiles > 1:
        row = [*([*patches, ids.tile_x] * (canvas.columns - 1)), *patches, ids.tile_y]
        found += row * canvas.rows
    array = np.array([*found, ids.image, *patches, ids.end], np.int64)
    array.flags.writeable = False
    return array
