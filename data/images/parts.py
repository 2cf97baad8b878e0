"""Documents of parts: text, pictures and videos in the order of reading. Pictures and videos stay encoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from core.errors import ConfigError, printable


@dataclass(frozen=True)
class ImagePart:
    """An encoded picture. `name`: its path or its place in the record, for messages."""

    data: bytes
    name: str


@dataclass(frozen=True)
class VideoPart:
    """An encoded video. `name`: its path or its place in the record, for messages."""

    data: bytes
    name: str


Part = str | ImagePart | VideoPart


@dataclass(frozen=True)
class PartsDocument:
    """A document of text, pictures and videos. `id`: its file, and its line, row or key there.

    A record without content gives a document without parts. Nothing is put between parts that follow each other.
    """

    id: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, each from a new line. Pictures and videos leave nothing in it."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the kinds and contents of the parts. Names and the id do not count."""
        digest = hashlib.sha256()
        for part in self.parts:
            content = part.encode() if isinstance(part, str) else part.data
            digest.update(f"{type(part).__name__}:{len(content)}:".encode())
            digest.update(content)
        return digest.hexdigest()

    @cached_property
    def image_digests(self) -> tuple[str, ...]:
        """The SHA-256 of the bytes of each picture and video, in order."""
        return tuple(hashlib.sha256(part.data).hexdigest() for part in self.parts if not isinstance(part, str))


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot become a document. Printed, it is one line with its id."""

    id: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.id}: {self.reason}")


@dataclass(frozen=True)
class PartsConfig:
    """The columns of text, pictures and videos in the records of a source."""

    text_key: str = "text"
    """Column of the text or caption."""
    parts_key: str = "parts"
    """Column of a list of parts, each {"text": ...}, {"image": path} or {"video": path}."""
    image_key: str | None = None
    """Column of one picture. null: in parquet the one column that holds pictures, in jsonl `image`."""
    images_key: str = "images"
    """Column of a list of pictures. They go where the text has the marker, or where `texts_key` has null."""
    texts_key: str = "texts"
    """Column of a list of texts, each of them null where there is a picture, or of turns with `user`, `assistant`."""
    marker: str = "<image>"
    """Text that stands for a picture. Where a record has pictures but no marker, the pictures come first."""
    largest_bytes: int = 64 * 2**20
    """Most bytes of an encoded picture or video."""

    def __post_init__(self) -> None:
        keys = ("text_key", "parts_key", "image_key", "images_key", "texts_key")
        used: dict[str, str] = {}
        for key in keys:
            name = getattr(self, key)
            if name == "":
                raise ConfigError(key, name, "must name a column")
            if name is not None and used.setdefault(name, key) != key:
                raise ConfigError(key, name, f"is the column of {used[name]} too; choose another")
        if not self.marker:
            raise ConfigError("marker", self.marker, "must not be empty")
        if self.largest_bytes < 1:
            raise ConfigError("largest_bytes", self.largest_bytes, "must be at least 1")
