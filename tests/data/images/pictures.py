"""Pictures and sizes that the fixtures' script and the tests make alike: by integers alone, equal on every machine."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from data.images.canvas import TileConfig

LLAMA = TileConfig()
SMALL, FEW, LARGEST = TileConfig(28), TileConfig(56, max_tiles=4), TileConfig(28, resize_to_max_canvas=True)
PICTURES: list[tuple[int, int, TileConfig]] = [
    *((height, width, LLAMA) for height, width in ((336, 336), (337, 336), (480, 640), (61, 90))),
    *((height, width, SMALL) for height, width in ((28, 28), (29, 28), (28, 29), (1, 1), (1, 300), (300, 1))),
    *((height, width, SMALL) for height, width in ((5, 3), (27, 200), (400, 31), (112, 112), (113, 112), (500, 470))),
    *((height, width, SMALL) for height, width in ((97, 64), (40, 71), (333, 1000), (900, 60), (56, 84))),
    *((height, width, FEW) for height, width in ((56, 56), (90, 57), (640, 480), (20, 19), (1200, 100), (112, 224))),
    *((height, width, LARGEST) for height, width in ((20, 33), (64, 64), (500, 300))),
]
"""Height, width and tiles of each picture of the fixtures."""
SIZE_CONFIGS = [LLAMA, TileConfig(max_tiles=4), TileConfig(560, max_tiles=9), TileConfig(resize_to_max_canvas=True)]
SIZES_PER_CONFIG = 1250


def picture(number: int) -> Any:
    """Return picture `number` of `PICTURES`, uint8 [height, width, 3]: gradients, edges, and noise if it is small."""
    height, width, config = PICTURES[number]
    y, x = np.mgrid[:height, :width].astype(np.int64)
    scale = max(1, max(height, width) // 97) * (1 if config.tile_size < 100 else 3)
    waves = [(x * x // (7 * scale) + y * (number + 1) // scale) % 256, (x * y // (11 * scale) + 9 * number) % 256]
    blocks = (x // (5 * scale) * 37 + y // (4 * scale) * 101 + number * 53) % 256
    found = np.stack([*waves, blocks], -1)
    if config.tile_size < 100:
        noise = (x * 2654435761 + y * 40503 + number * 97) * 2246822519 % 2**32 // 2**13 % 256
        found = np.where((noise % 3 == 0)[..., None], noise[..., None], found)
    return found.astype(np.uint8)


def sizes() -> list[tuple[int, int, TileConfig]]:
    """Return 5,000 heights and widths: of all magnitudes, near multiples of the tile and with simple ratios."""
    chance = random.Random(21)
    found = []
    for config in SIZE_CONFIGS:
        for number in range(SIZES_PER_CONFIG):
            height = width = 0
            match number % 4:
                case 0:
                    height, width = (round(2 ** chance.uniform(0, 13)) for _ in range(2))
                case 1:
                    height, width = (chance.randint(1, 1500) for _ in range(2))
                case 2:
                    height, width = (
                        max(1, chance.randint(1, 17) * config.tile_size + chance.randint(-2, 2)) for _ in range(2)
                    )
                case 3:
                    unit = chance.randint(1, 700)
                    height, width = (unit * chance.randint(1, 8) for _ in range(2))
            found.append((height, width, config))
    return found
