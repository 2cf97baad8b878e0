"""How pictures and videos become tokens and tiles."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum

from core.errors import ConfigError, check_numbers
from data.images.video import FrameConfig

MOST_TILES = 1024
"""Largest `max_tiles`. Every grid of at most this many tiles is compared for each new size of a picture."""
LARGEST_TILE = 2**14
"""Largest `tile_size`."""


@dataclass(frozen=True)
class TileConfig:
    """How pictures are cut into square tiles. The defaults are Llama 4's."""

    tile_size: int = 336
    """Side of a tile in pixels."""
    patch_size: int = 14
    """Side of a patch in pixels. The encoder merges 2 x 2 patches into one token."""
    max_tiles: int = 16
    """Most tiles of one picture, without the global tile: the whole picture at the size of one tile."""
    resize_to_max_canvas: bool = False
    """Enlarge a picture to the largest canvas that it fills best. Llama 4 does not."""

    def __post_init__(self) -> None:
        for key in ("tile_size", "patch_size", "max_tiles"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be positive")
        if self.tile_size % (2 * self.patch_size):
            reason = f"must be a multiple of {2 * self.patch_size}, twice the patch size: 2 x 2 patches make one token"
            nearest = max(1, round(self.tile_size / (2 * self.patch_size))) * 2 * self.patch_size
            raise ConfigError("tile_size", self.tile_size, reason, [nearest])
        for key, most in (("tile_size", LARGEST_TILE), ("max_tiles", MOST_TILES)):
            if getattr(self, key) > most:
                raise ConfigError(key, getattr(self, key), f"must be at most {most}")

    @property
    def tokens_per_tile(self) -> int:
        """Placeholder tokens of one tile, 144 by default."""
        return (self.tile_size // self.patch_size // 2) ** 2


class BadMedia(Enum):
    """Policy for a document with a picture or video that cannot be used: fail, or drop and count the document."""

    fail = "fail"
    drop = "drop"


@dataclass(frozen=True)
class ImageTokenNames:
    """Names of the tokens that stand for a picture. A `bpe` tokenizer adds them; other tokenizers must have them."""

    start: str = "<|image_start|>"
    """Begins a picture."""
    end: str = "<|image_end|>"
    """Ends a picture."""
    image: str = "<|image|>"
    """Precedes the global tile, or the only one."""
    patch: str = "<|patch|>"
    """The placeholder that an encoded token replaces."""
    tile_x: str = "<|tile_x_separator|>"
    """Separates the tiles of a row."""
    tile_y: str = "<|tile_y_separator|>"
    """Ends a row of tiles."""

    def __post_init__(self) -> None:
        names = self.names
        for key in fields(self):
            if not (name := getattr(self, key.name)) or names.count(name) > 1:
                raise ConfigError(key.name, name, "must be a name of its own")

    @property
    def names(self) -> list[str]:
        return [getattr(self, key.name) for key in fields(self)]


@dataclass(frozen=True)
class ImagesConfig:
    """Pictures and videos of all sources. The defaults are Llama 4's."""

    tiles: TileConfig = field(default_factory=TileConfig)
    tokens: ImageTokenNames = field(default_factory=ImageTokenNames)
    frames: FrameConfig = field(default_factory=FrameConfig)
    max_images: int = 48
    """Most pictures in a document, the frames of its videos included."""
    largest_pixels: int = 40_000_000
    """Most pixels of a picture."""
    on_bad: BadMedia = BadMedia.fail

    def __post_init__(self) -> None:
        check_numbers(self, positive=("max_images", "largest_pixels"))
