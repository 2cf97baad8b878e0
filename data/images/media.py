"""Turn the parts of a document into token ids and the pictures that they stand for.

Each picture is decoded once here, so that training meets no bad one. Frames of a video are stored as pictures (PNG),
each after a text with its time.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError, DataError, OneLineError
from data.images.canvas import Canvas, ImageTokens, TileConfig, best_canvas, placeholder_ids, placeholder_length
from data.images.config import ImagesConfig
from data.images.decode import BadImage, decode, decoder_fingerprint, decoder_versions
from data.images.parts import ImagePart, Part, VideoPart
from data.images.tiles import tiles
from data.images.video import BadVideo, frames, time_text


class BadMediaError(OneLineError):
    """A document has a picture or video that cannot be used. The message is one line."""


@dataclass(frozen=True)
class EncodedPicture:
    """An encoded picture and its canvas."""

    data: bytes
    canvas: Canvas
    name: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


Look = Callable[[EncodedPicture, Any], None]
"""Called with each picture of a document, and with the same decoded by Pillow, in RGB."""


def text_and_pictures(
    parts: Sequence[Part], config: ImagesConfig, look: Look | None = None
) -> list[str | EncodedPicture]:
    """Return the texts and pictures of a document. Videos become frames. Raises `BadMediaError`."""
    found: list[str | EncodedPicture] = []
    try:
        for part in parts:
            for one in [part] if isinstance(part, str) else _pictures(part, config, look):
                found.append(one)
                if sum(isinstance(one, EncodedPicture) for one in found) > config.max_images:
                    most = f"{config.max_images} pictures and frames (data.images.max_images)"
                    raise BadMediaError(f"has more than {most}")
    except (BadImage, BadVideo) as error:
        raise BadMediaError(str(error)) from None
    return found


def _pictures(part: ImagePart | VideoPart, config: ImagesConfig, look: Look | None) -> Iterator[str | EncodedPicture]:
    if isinstance(part, ImagePart):
        yield _picture(part.data, part.name, config, look)
        return
    for frame in frames(part.data, part.name, config.frames):
        file = io.BytesIO()
        frame.picture.save(file, "PNG", compress_level=1)
        text = time_text(frame.seconds)
        yield text
        yield _picture(file.getvalue(), f"{part.name} at {text.strip()}", config, look)


def _picture(data: bytes, name: str, config: ImagesConfig, look: Look | None) -> EncodedPicture:
    decoded = decode(data, name, config.largest_pixels)
    width, height = decoded.size
    picture = EncodedPicture(data, best_canvas(height, width, config.tiles), name)
    if look is not None:
        look(picture, decoded)
    return picture


@dataclass(frozen=True)
class ImageDescription:
    """What a corpus records of its pictures: the tiles, the token ids, and the libraries that decoded them."""

    tiles: TileConfig
    ids: ImageTokens
    largest_pixels: int
    decoder: str
    versions: dict[str, str]
    SHAPE: ClassVar[dict[str, Any]] = {
        "tiles": {"tile_size": int, "patch_size": int, "max_tiles": int, "resize_to_max_canvas": bool},
        "ids": {field.name: int for field in fields(ImageTokens)},
        **{"largest_pixels": int, "decoder": str, "versions": {str: str}},
    }
    """The shape of an entry of a manifest, for `core.files.misfit`."""

    @staticmethod
    def read(entry: dict[str, Any]) -> ImageDescription:
        """Read the entry of a manifest, of the right shape. Raises `ValueError` or `TypeError` if it is damaged."""
        try:
            config, ids = TileConfig(**entry["tiles"]), ImageTokens(**entry["ids"])
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return ImageDescription(config, ids, entry["largest_pixels"], entry["decoder"], entry["versions"])

    def read_picture(self, data: bytes, name: str) -> tuple[list[int], NDArray[np.uint8]]:
        """Return the token ids for an encoded picture and its tiles, uint8 [N, 3, S, S]. Raises `BadImage`."""
        canvas, found = tiles(decode(data, name, self.largest_pixels), self.tiles)
        return placeholder_ids(canvas, self.tiles.tokens_per_tile, self.ids).tolist(), found

    def check_decoder(self) -> None:
        """Raise `DataError` if this machine decodes pictures to other pixels than the one that made the corpus."""
        if decoder_fingerprint() != self.decoder:
            was, now = (", ".join(f"{k} {v}" for k, v in one.items()) for one in (self.versions, decoder_versions()))
            advice = "install the same versions, or train on other pixels with data.verify=false"
            raise DataError(f"pictures were tokenised with {was}, but this machine decodes with {now}: {advice}")


class ImageSpelling:
    """Turns documents of parts into ids. `special_id`: the id of a special token by name, None if there is none."""

    def __init__(self, config: ImagesConfig, special_id: Callable[[str], int | None]) -> None:
        self.config, self.per_tile = config, config.tiles.tokens_per_tile
        ids = {}
        for field in fields(config.tokens):
            name = getattr(config.tokens, field.name)
            if (found := special_id(name)) is None:
                reason = "is no special token of the tokenizer: name its own, or take one with tokens for images"
                raise ConfigError(f"data.images.tokens.{field.name}", name, reason)
            ids[field.name] = found
        self.ids = ImageTokens(**ids)

    def describe(self) -> dict[str, Any]:
        """Return the entry in the manifest."""
        return {
            "tiles": asdict(self.config.tiles),
            "ids": asdict(self.ids),
            "largest_pixels": self.config.largest_pixels,
            "decoder": decoder_fingerprint(),
            "versions": decoder_versions(),
        }

    def pieces(self, parts: Sequence[Part], longest: int | None) -> list[str | EncodedPicture]:
        """Return the texts and pictures of a document. Raises `BadMediaError`, also for a picture that with BOS and EOS
        takes more than `longest` tokens.
        """
        found = text_and_pictures(parts, self.config)
        for one in found:
            if isinstance(one, EncodedPicture) and longest is not None:
                tokens = placeholder_length(one.canvas, self.per_tile)
                if tokens + 2 > longest:
                    advice = f"raise data.pack_seq_len from {longest} or lower data.images.tiles.max_tiles"
                    raise BadMediaError(f"{one.name}: takes {tokens} tokens, more than a sequence: {advice}")
        return found


def spell(
    pieces: Sequence[str | EncodedPicture], encoded: Iterator[Sequence[int]], images: ImageSpelling
) -> tuple[NDArray[np.int64], list[tuple[int, int, EncodedPicture]]]:
    """Join the ids of the texts, taken from `encoded` in order, and the placeholders of the pictures. Return the ids,
    and for each picture the index of its first token, the number of its tokens and the picture.
    """
    arrays: list[NDArray[np.int64]] = []
    pictures, size = [], 0
    for piece in pieces:
        if isinstance(piece, EncodedPicture):
            array = placeholder_ids(piece.canvas, images.per_tile, images.ids)
            pictures.append((size, len(array), piece))
        else:
            array = np.asarray(next(encoded), np.int64)
        arrays.append(array)
        size += len(array)
    return np.concatenate(arrays), pictures
