"""Look at the pictures of a document: whether they can be decoded, what they resemble, and how they look when small."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from data.filter.input.records import RecordPicture
from data.images.canvas import placeholder_length
from data.images.config import ImagesConfig
from data.images.media import EncodedPicture, text_and_pictures
from data.images.parts import Part
from data.images.phash import hash_and_colours

THUMBNAILS = 3
"""Pictures of a document that are kept small, for the audit."""
_SIDE, _QUALITY = 96, 70


def pictures_of(parts: Sequence[Part], config: ImagesConfig) -> tuple[RecordPicture, ...]:
    """Decode each picture and each frame of a document once. Raises `BadMediaError` for one that cannot be used."""
    found: list[RecordPicture] = []

    def look(picture: EncodedPicture, decoded: Any) -> None:
        hash_, colours = hash_and_colours(decoded)
        found.append(
            RecordPicture(
                name=picture.name,
                sha256=picture.sha256,
                size=len(picture.data),
                width=decoded.width,
                height=decoded.height,
                tiles=picture.canvas.tiles,
                tokens=placeholder_length(picture.canvas, config.tiles.tokens_per_tile),
                hash=hash_,
                colours=colours,
                thumbnail=_thumbnail(decoded) if len(found) < THUMBNAILS else None,
            )
        )

    text_and_pictures(parts, config, look)
    return tuple(found)


def _thumbnail(picture: Any) -> bytes:
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((_SIDE, _SIDE))
    small.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
