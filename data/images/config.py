"""How pictures and videos become tokens and tiles."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum

from core.errors import ConfigError, check_numbers
from data.images.canvas import TileConfig
from data.images.video import FrameConfig


class BadMedia(Enum):
    """Policy for a document with a picture or video that cannot be used: fail, or drop and count the document."""

    fail = "fail"
    drop = "drop"


@dataclass(frozen=True)
class ImageTokenNames:
    """Names of the tokens that stand for a picture. A `bpe` tokenizer adds them; other tokenizers must have them."""

    start: str = "<|image_start|>"
    end: str = "<|image_end|>"
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
