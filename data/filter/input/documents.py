"""Read documents of text, pictures and videos as records. Their text alone is screened and scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.config import plain
from core.errors import ConfigError, printable
from core.files import sha256_file, sha256_text
from data.files import UnreadableFile, find_files
from data.filter.config import InputConfig, under
from data.filter.input.pictures import pictures_of
from data.filter.input.readers import MalformedRecord
from data.filter.input.records import Record
from data.images.config import BadMedia, ImagesConfig
from data.images.media import BadMediaError
from data.images.parts import BadRecord, PartsConfig, PartsDocument
from data.images.readers import SUFFIXES, read_documents


def document_parts(config: InputConfig) -> list[DocumentsPart]:
    """List the files of an input in a fixed order. Raises `ConfigError` if there is nothing to read."""
    assert config.images is not None
    with under("input"):
        return [
            DocumentsPart(name, path, config.images, config.parts)
            for name, path in find_files(str(config.input), SUFFIXES)
        ]


@dataclass(frozen=True)
class DocumentsPart:
    """The documents of a file. Paths of pictures start at its folder."""

    name: str
    path: Path
    images: ImagesConfig
    columns: PartsConfig

    @property
    def fingerprint(self) -> str:
        """Hash the file, and the documents of a file that may name pictures by path."""
        digests = []
        if not self.path.name.endswith(".tar"):
            digests = [str(one) if isinstance(one, BadRecord) else one.digest for one in self.documents()]
        return sha256_text(self.name, sha256_file(self.path), *digests)

    @property
    def keys(self) -> dict[str, str | None]:
        return {
            f"{name}.{key}": json.dumps(value)
            for name, settings in (("images", self.images), ("parts", self.columns))
            for key, value in plain(settings).items()
        }

    def documents(self) -> Iterator[PartsDocument | BadRecord]:
        """Read the file. Raises `ConfigError` if it is damaged or lacks the columns."""
        try:
            with under("parts"):
                yield from read_documents(self.path, self.columns, name=self.name)
        except UnreadableFile as error:
            raise ConfigError("input", str(self.path), f"cannot be read: {error}") from None

    def records(self) -> Iterator[Record | MalformedRecord]:
        for number, document in enumerate(self.documents()):
            if isinstance(document, BadRecord):
                # a key may come twice in a tar, but ids are unique
                name = f"{document.id} ({number})" if self.path.name.endswith(".tar") else document.id
                yield self._bad(name, document.reason)
                continue
            try:
                pictures = pictures_of(document.parts, self.images)
            except BadMediaError as error:
                yield self._bad(document.id, str(error))
            else:
                yield Record(document.id, "all", document.id, document.text, pictures=pictures)

    def _bad(self, name: str, reason: str) -> MalformedRecord:
        """Raise `ConfigError`, or return the record that will be dropped and counted."""
        if self.images.on_bad is BadMedia.fail:
            raise ConfigError("input", name, printable(reason), ["images.on_bad=drop"])
        return MalformedRecord(name, name, printable(reason))
