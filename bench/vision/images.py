"""Measure how many pictures a second and core one thread turns from encoded bytes into normalised pixels."""

from __future__ import annotations

import io
import statistics
import time
from typing import Any

import numpy as np

from bench.measure import Result, spread
from data.images.canvas import TileConfig
from data.images.decode import decode, pillow
from data.images.tiles import normalise, tiles

ROUNDS, FLOOR = 15, 50.0
CASES = [
    ("JPEG 336 x 336 to one tile", "JPEG", (336, 336), TileConfig()),
    ("JPEG 640 x 480 to one tile", "JPEG", (480, 640), TileConfig(max_tiles=1)),
    ("WebP 640 x 480 to one tile", "WEBP", (480, 640), TileConfig(max_tiles=1)),
    ("PNG 640 x 480 to one tile", "PNG", (480, 640), TileConfig(max_tiles=1)),
    ("JPEG 640 x 480 to 2 x 2 tiles", "JPEG", (480, 640), TileConfig()),
    ("JPEG 1280 x 720 to 3 x 4 tiles", "JPEG", (720, 1280), TileConfig()),
]
"""What is measured. Only a JPEG that becomes one tile has a floor."""


def encoded(kind: str, size: tuple[int, int]) -> bytes:
    """Return a picture as smooth as a photo: noise of one value in 16 x 16 pixels, enlarged, with fine noise."""
    chance, (height, width) = np.random.default_rng(0), size
    coarse = chance.integers(0, 256, (height // 16, width // 16, 3)).astype(np.uint8)
    smooth = np.asarray(pillow().fromarray(coarse).resize((width, height), pillow().Resampling.BICUBIC))
    grain = smooth + chance.normal(0, 4, (height, width, 3))
    file = io.BytesIO()
    pillow().fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, kind, quality=85)
    return file.getvalue()


def seconds(data: bytes, config: TileConfig) -> tuple[list[float], Any]:
    """Return the processor's seconds of each round from bytes to float32 pixels [N, 3, S, S], and the pixels."""
    times, pixels = [], None
    for _ in range(ROUNDS):
        begin = time.thread_time()
        pixels = normalise(tiles(decode(data, "sample"), config)[1])
        times.append(time.thread_time() - begin)
    return times, pixels


def run() -> list[Result]:
    found = []
    for name, kind, size, config in CASES:
        data = encoded(kind, size)
        times, pixels = seconds(data, config)
        rate = 1 / statistics.median(times)
        bounded = kind == "JPEG" and len(pixels) == 1
        bound, holds = (">= 1", rate >= FLOOR) if bounded else ("-", True)
        note = f"{len(data) / 1000:.0f} kB, CPU time of one thread, spread {spread(times):.0%}; 'theirs' is the floor"
        found.append(Result(f"{name} (pictures/s and core)", rate, FLOOR, rate / FLOOR, bound, holds, note))
    return found
