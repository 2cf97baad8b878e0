"""Encoded pictures, whole and damaged, for the tests of decoding."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def sample(height: int = 48, width: int = 64) -> Any:
    """Return an RGB picture whose four corners differ."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 3 % 256, y * 5 % 256, (x + y) % 256], -1).astype(np.uint8))


def encoded(picture: Any, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG with its checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """Return a PNG of these compressed rows, with extra chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_of_greys(greys: Any) -> bytes:
    """Return a PNG of 16-bit greys."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in greys)
    return png(greys.shape[1], greys.shape[0], 16, 0, zlib.compress(rows))


def huge_png(width: int = 30_000, height: int = 30_000) -> bytes:
    """Return a PNG of few bytes that claims many pixels."""
    return png(width, height, 8, 2, zlib.compress(b"\0" * 100))


def text_bomb() -> bytes:
    """Return a PNG with a text chunk that unpacks to 64 MiB."""
    return png(1, 1, 8, 0, zlib.compress(b"\0\0"), chunk(b"zTXt", b"key\0\0" + zlib.compress(b"a" * 2**26)))


def tiff(width: int, height: int, compression: int = 1, strip: bytes = b"\0" * 64, **other: int) -> bytes:
    """Return a grey TIFF with one strip. `other`: tags by number, as `t274=6`."""
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 0, 277: 1, 278: height, 279: len(strip)}
    tags |= {int(name[1:]): value for name, value in other.items()}
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0) + strip


def turned(picture: Any, orientation: int, kind: str, **settings: Any) -> bytes:
    """Return a picture with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, kind, exif=exif, **settings)


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
