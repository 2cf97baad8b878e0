"""Encoded pictures beside a token stream, with an index by token: `PREFIX-images.bin` and `PREFIX-images.parquet`.

The index tells which picture a placeholder belongs to, so that a window which begins or ends inside a picture finds its
tiles.

Shapes: S side of a tile in pixels, Q image tokens per tile.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import DataError
from core.files import sha256_file
from data.files import UnreadableFile, reading
from data.images.batch import TileRef
from data.images.canvas import Canvas, placeholder_ids
from data.images.decode import BadImage, decode
from data.images.media import EncodedPicture, ImageDescription
from data.images.tiles import tiles

BYTES, INDEX = "-images.bin", "-images.parquet"
_COLUMNS = ("start", "tokens", "rows", "columns", "offset", "bytes")
_TEXTS = (("sha256", "string"), ("name", "string"))
DECODED_BYTES = 64 * 2**20
"""Bytes of decoded tiles to keep, beside the last picture: the tiles of one follow each other, and an evaluation shows
each picture with its own document and with another.
"""


@dataclass(frozen=True)
class StoredPicture:
    """Where a picture's bytes are, and how many tokens it takes. Its first token is known once it is packed."""

    tokens: int
    canvas: Canvas
    offset: int
    bytes: int
    sha256: str
    name: str


class PictureWriter:
    """Write the pictures of one stream. `add` stores the bytes, `place` says where in the stream a picture begins."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self.directory, self.prefix = directory, prefix
        self._file: IO[bytes] | None = None
        self._offset, self.count = 0, 0
        self._rows: list[tuple[Any, ...]] = []
        self._writer: Any = None

    def add(self, picture: EncodedPicture, tokens: int) -> StoredPicture:
        if self._file is None:
            self._file = open(self.directory / (self.prefix + BYTES), "wb")  # noqa: SIM115 - outlives this call
        self._file.write(picture.data)
        offset, self._offset = self._offset, self._offset + len(picture.data)
        return StoredPicture(tokens, picture.canvas, offset, len(picture.data), picture.sha256, picture.name)

    def place(self, start: int, picture: StoredPicture) -> None:
        canvas = picture.canvas
        place = (start, picture.tokens, canvas.rows, canvas.columns, picture.offset, picture.bytes)
        self._rows.append((*place, picture.sha256, picture.name))
        self.count += 1
        if len(self._rows) >= 4096:
            self._flush()

    def close(self) -> dict[str, Any] | None:
        """Return the entry in the manifest, or None without pictures."""
        if self._file is None:
            return None
        self._file.close()
        self._flush()
        self._writer.close()
        index = self.directory / (self.prefix + INDEX)
        return {
            "file": self.prefix + BYTES,
            "bytes": self._offset,
            "index": index.name,
            "index_sha256": sha256_file(index),
            "count": self.count,
        }

    def _flush(self) -> None:
        import pyarrow.parquet

        schema = pyarrow.schema([*((name, "int64") for name in _COLUMNS), *_TEXTS])
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self.directory / (self.prefix + INDEX), schema)
        columns = list(zip(*self._rows, strict=True)) or [()] * len(schema.names)
        self._writer.write_table(pyarrow.table(dict(zip(schema.names, columns, strict=True)), schema))
        self._rows = []


class PictureStream:
    """The pictures of one stream, opened to be read. Raises `DataError` for files that do not fit the manifest."""

    def __init__(self, directory: Path, entry: dict[str, Any], name: str, images: ImageDescription) -> None:
        self.entry, self.name, self.images, self.config = entry, name, images, images.tiles
        self.path, self._index = directory / entry["file"], directory / entry["index"]
        if "/" in entry["file"] or "/" in entry["index"]:
            raise DataError(f"{directory}: the manifest names {entry['file']}: it may be damaged")
        found = self.path.stat().st_size if self.path.exists() else -1
        if found != entry["bytes"] or not self._index.exists():
            raise DataError(f"{self.path} is missing or does not have {entry['bytes']} bytes")
        table = self._read(*_COLUMNS)
        columns = [table[name].to_numpy().astype(np.int64, casting="same_kind") for name in _COLUMNS]
        self.starts, self.lengths, self.rows, self.columns, self.offsets, self.sizes = columns
        if len(self.starts) != entry["count"] or not self._fits(found):
            raise DataError(f"{self._index} does not fit {self.path}")
        self._bytes = np.memmap(self.path, np.uint8, "r") if found else np.empty(0, np.uint8)
        self._decoded: dict[int, NDArray[np.uint8]] = {}
        self._held = 0
        self._lock = threading.Lock()

    def _read(self, *columns: str) -> Any:
        """Return columns of the index, as a table."""
        import pyarrow.parquet

        try:
            with reading():
                return pyarrow.parquet.read_table(self._index, columns=list(columns))
        except UnreadableFile as error:
            raise DataError(f"{self._index} cannot be read: {error}") from None

    def _fits(self, size: int) -> bool:
        """Return whether the pictures lie in order and apart in the stream, and inside the file of `size` bytes."""
        grids, most, q = (self.rows, self.columns), self.config.max_tiles, self.config.tokens_per_tile
        if not all(np.all((grid >= 1) & (grid <= most)) for grid in grids):
            return False
        several = np.where(self.rows * self.columns > 1, self.rows * self.columns, 0)
        is_whole = np.all(several <= most) and np.all(self.lengths == several * (q + 1) + q + 3)
        is_ordered = np.all(self.starts >= 0) and np.all(self.starts[1:] >= (self.starts + self.lengths)[:-1])
        is_inside = np.all(self.offsets >= 0) and np.all(self.sizes > 0) and np.all(self.sizes <= size - self.offsets)
        return bool(is_whole and is_ordered and is_inside)

    def canvas(self, image: int) -> Canvas:
        return Canvas(int(self.rows[image]), int(self.columns[image]))

    @property
    def num_tiles(self) -> int:
        grids = self.rows * self.columns
        return int((grids + (grids > 1)).sum())  # with a global tile, as `Canvas.tiles`

    def rows_of(self, start: int, length: int) -> tuple[NDArray[np.int64], list[TileRef]]:
        """Return, for tokens [start, start + length) of the stream, the encoder row of each placeholder (-1 for other
        tokens) and the tiles, in order. A row is tile * Q + q, with the tiles counted from the first in the window.
        """
        rows = np.full(length, -1, np.int64)
        refs: list[TileRef] = []
        for image in self.inside(start, start + length):
            places, q = self._placeholders(image), self.config.tokens_per_tile
            inside = places + (int(self.starts[image]) - start)
            seen = np.flatnonzero((inside >= 0) & (inside < length))
            if len(seen):
                tile = int(seen[0]) // q
                rows[inside[seen]] = seen + (len(refs) - tile) * q
                refs += [TileRef(self.name, image, one) for one in range(tile, int(seen[-1]) // q + 1)]
        return rows, refs

    def inside(self, start: int, stop: int) -> range:
        """Return the numbers of the pictures that have a token in [start, stop) of the stream."""
        first = int(np.searchsorted(self.starts + self.lengths, start, "right"))
        return range(first, int(np.searchsorted(self.starts, stop)))

    def describe(self, image: int) -> StoredPicture:
        sha256, name = (texts[image] for texts in self._texts)
        tokens, offset, size = (int(values[image]) for values in (self.lengths, self.offsets, self.sizes))
        return StoredPicture(tokens, self.canvas(image), offset, size, sha256, name)

    @cached_property
    def _texts(self) -> tuple[list[str], list[str]]:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.path.parent / self.entry["index"], columns=["sha256", "name"])
        return table["sha256"].to_pylist(), table["name"].to_pylist()

    def _placeholders(self, image: int) -> NDArray[np.int64]:
        ids = placeholder_ids(self.canvas(image), self.config.tokens_per_tile, self.images.ids)
        return np.flatnonzero(ids == self.images.ids.patch)

    def decode(self, ref: TileRef) -> NDArray[np.uint8]:
        """Return the tile, uint8 [3, S, S]. Raises `DataError` if the picture is damaged."""
        with self._lock:
            found = self._decoded.get(ref.image)
            if found is None:
                found = self._decoded[ref.image] = self._tiles(ref.image)
                self._held += found.nbytes
                while self._held > DECODED_BYTES and len(self._decoded) > 1:
                    self._held -= self._decoded.pop(next(iter(self._decoded))).nbytes
        return found[ref.tile]

    def distant(self, ref: TileRef) -> TileRef:
        """Return a tile of the picture that is half a stream away: of another document, if there are several."""
        image = (ref.image + max(1, len(self.starts) // 2)) % len(self.starts)
        return TileRef(ref.stream, image, ref.tile % self.canvas(image).tiles)

    def content(self, image: int) -> bytes:
        begin = int(self.offsets[image])
        return self._bytes[begin : begin + int(self.sizes[image])].tobytes()

    def _tiles(self, image: int) -> NDArray[np.uint8]:
        try:
            canvas, found = tiles(
                decode(self.content(image), f"picture {image} of {self.path}", self.images.largest_pixels), self.config
            )
        except BadImage as error:
            raise DataError(str(error)) from None
        if canvas != self.canvas(image):
            raise DataError(f"picture {image} of {self.path} is not the one that was tokenised")
        return found

    def verify(self, part: int = 0, parts: int = 1) -> Iterator[str]:
        """Yield a message for each damaged file. Part `part` of `parts` has its share of the pictures, whose hashes are
        in the index, and the first part the index.
        """
        if part == 0 and sha256_file(self._index) != self.entry["index_sha256"]:
            yield f"{self._index} does not match its SHA-256"
        hashes, count = self._read("sha256")["sha256"], len(self.starts)
        for image in range(count * part // parts, count * (part + 1) // parts):
            if hashlib.sha256(self.content(image)).hexdigest() != hashes[image].as_py():
                yield f"{self.path} does not match its SHA-256 (picture {image})"
                return
