"""Generate pictures of characters with their Unicode names, such as a snowman and "SNOWMAN".

The characters are those of the DejaVu fonts that matplotlib brings. A picture is a pure function of (seed, number) for
one version of Python (names), matplotlib (fonts) and Pillow (pixels). Training uses the numbers from 0 on and held-out
pictures the negative ones: their characters have been seen, but in another size, place, face or colour.
"""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from data.images.generated.draws import Draws
from data.images.generated.scenes import COLOURS, draw_background
from data.images.packages import require

_UNSEEN = "CMZ"
"""First letters of the Unicode categories that show nothing by themselves: controls, marks, spaces."""


@dataclass(frozen=True)
class GlyphConfig:
    seed: int = 0
    size: int = 112
    """Width and height of a picture in pixels."""

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 1024:
            raise ConfigError("size", self.size, "must be from 16 to 1024 pixels")


def glyph(number: int, config: GlyphConfig) -> tuple[bytes, str]:
    """Return a character's picture as a PNG, and its name. Each face's each character is equally likely."""
    require("PIL")
    from PIL import Image, ImageDraw

    draws, size = Draws("glyph", config.seed, number), config.size
    characters = _characters()
    face, code = characters[draws.below(len(characters))]
    background = draw_background(draws)
    colour = list(COLOURS.values())[draws.below(len(COLOURS))]
    picture = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(picture)
    font = _font(face, size // 2)
    left, top, right, bottom = draw.textbbox((0, 0), chr(code), font)
    longest, wanted = max(1, round(right - left), round(bottom - top)), size * draws.between(50, 90) // 100
    font = _font(face, max(8, min(size, size // 2 * wanted // longest)))
    left, top, right, bottom = map(round, draw.textbbox((0, 0), chr(code), font))
    x, y = (draws.below(max(1, size - extent)) for extent in (right - left, bottom - top))
    draw.text((x - left, y - top), chr(code), colour, font)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue(), unicodedata.name(chr(code))


@cache
def _characters() -> list[tuple[Path, int]]:
    """Return each face and character that draws something and has a name. Skip placeholder fonts."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font, LoadFlags

    found = []
    for path in sorted(Path(get_data_path(), "fonts", "ttf").glob("DejaVu*.ttf")):
        font = FT2Font(str(path))
        named = (code for code in sorted(font.get_charmap()) if unicodedata.name(chr(code), ""))
        seen = (code for code in named if unicodedata.category(chr(code))[0] not in _UNSEEN)
        found += [(path, code) for code in seen if font.load_char(code, LoadFlags.NO_SCALE).width]
    return found


@cache
def _font(path: Path, pixels: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)
