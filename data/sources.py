"""Read the documents of a source. A hash of a document's origin decides whether it is held out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from core.errors import ConfigError, printable
from core.files import sha256_file, sha256_text
from core.import_path import construct
from data import builtin
from data.config import DataConfig, Section, SourceConfig, SourceKind, Undecodable
from data.digests import FileDigests
from data.files import (
    SUFFIXES,
    FileFormat,
    UnreadableFile,
    dataset_fingerprint,
    file_format,
    find_files,
    json_lines,
    open_parquet,
    read_document,
    stream_dataset,
    stream_tables,
)
from data.images import readers
from data.images.config import BadMedia, ImagesConfig
from data.images.contents import RefusedRecord, find_inside
from data.images.parts import BadRecord, Part, PartsDocument
from data.sampling import key_of

UNDECODABLE, EMPTY, BAD_MEDIA = "undecodable", "empty", "bad_media"
_ROWS = 32
"""Rows of a data set with pictures in memory at once."""


@dataclass(frozen=True)
class Document:
    """`dropped`: why the document has no text; it is yielded only for the counts. `name`: its name in the source.
    `parts`: text, pictures and videos in order, whose text alone is `text`; None for a document of text.
    """

    text: str
    held_out: bool
    dropped: str | None = None
    name: str | None = None
    parts: tuple[Part, ...] | None = None


class Source(Protocol):
    """Documents in a fixed order. They may be read more than once: to train a tokenizer, to filter and to tokenise."""

    name: str

    def fingerprint(self) -> str:
        """Return a hash that changes whenever the documents could."""
        ...

    def documents(self) -> Iterator[Document]: ...


def make_source(name: str, config: SourceConfig, data: DataConfig) -> Source:
    """Build a source. Raises `ConfigError` if there is nothing to read."""
    if isinstance(config.kind, str):
        return ImportedSource(name, config, data)
    kinds: dict[SourceKind, Any] = {
        SourceKind.builtin: BuiltinSource,
        SourceKind.files: FileSource,
        SourceKind.huggingface: HuggingFaceSource,
        SourceKind.documents: PartsSource,
    }
    return kinds[config.kind](name, config, data)


def may_have_pictures(config: SourceConfig) -> bool:
    """Return whether documents of a source can have pictures. Those of an imported class and of the hub may."""
    return isinstance(config.kind, str) or config.kind in (SourceKind.documents, SourceKind.huggingface)


def is_held_out(origin: str, share: float) -> bool:
    """Decide whether a document of this origin is held out; true for a fraction `share` of all origins."""
    return key_of("held out", origin) < share * 2**64


class BuiltinSource:
    """One section of the standard library. Files are shuffled, so that `max_bytes` keeps files of all packages."""

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        assert config.section is not None
        self.name, self.config, self.section, self.share = name, config, config.section, data.held_out
        self._files = sorted(builtin.files(self.section), key=lambda file: key_of(file.origin, file.name))
        if not self._files:
            reason = f"this Python has no {self.section.name} (slim images omit some): add ~data.sources.{name}"
            raise ConfigError(f"data.sources.{name}.section", self.section, reason)

    def fingerprint(self) -> str:
        return sha256_text(*(f"{file.name}:{hashlib.sha256(file.content).hexdigest()}" for file in self._files))

    def documents(self) -> Iterator[Document]:
        budget = Budget(self.config.max_bytes, self.share)
        unwanted = self._held_out_paragraphs()
        for file in self._files:
            held_out = is_held_out(file.origin, self.share)
            if budget.left[held_out] == 0:
                continue
            text = builtin.text_of(file, self.section)
            if text is None:
                yield Document("", held_out, UNDECODABLE)
                continue
            if unwanted and not held_out:
                text = builtin.without_paragraphs(text, unwanted)
            if text and budget.take(text, held_out):
                yield Document(text, held_out, name=file.name)

    def _held_out_paragraphs(self) -> set[str]:
        """Collect the paragraphs of held-out pydoc topics, since other topics repeat them."""
        if self.section is not Section.pydoc:
            return set()
        held_out = (file for file in self._files if is_held_out(file.origin, self.share))
        return {p for file in held_out for p in builtin.paragraphs(file.content.decode())}


class Budget:
    """End a source at `max_bytes` of training text and at the proportional amount of held-out text."""

    def __init__(self, max_bytes: int | None, share: float) -> None:
        self.left = {False: max_bytes, True: None if max_bytes is None else int(max_bytes * share / (1 - share))}

    def take(self, text: str, held_out: bool) -> bool:
        left = self.left[held_out]
        if left:
            self.left[held_out] = max(0, left - len(text.encode()))
        return left != 0

    @property
    def is_spent(self) -> bool:
        return all(left == 0 for left in self.left.values())


class FileSource:
    """Documents of jsonl, parquet and text files."""

    suffixes: tuple[str, ...] = SUFFIXES

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        self.name, self.config, self.data = name, config, data
        self.names: dict[Path, str] = {}
        self.held_out_paths = self._find(config.held_out_path, "held_out_path") if config.held_out_path else []
        held_out = {path.resolve() for path in self.held_out_paths}  # the folder `path` may contain them
        self.paths = [path for path in self._find(str(config.path), "path") if path.resolve() not in held_out]

    def fingerprint(self) -> str:
        """Hash the content and suffix of all files. If this takes too long at every start, tokenise once and use the
        result (`data.tokens`).
        """
        return sha256_text(*self._digests(self.paths), "|", *self._digests(self.held_out_paths))

    def documents(self) -> Iterator[Document]:
        share = 0.0 if self.held_out_paths else self.data.held_out
        yield from _documents(self._texts(self.paths), share, self.config.max_bytes)
        for text in self._texts(self.held_out_paths):
            yield replace(_document(text, 0.0), held_out=True)

    def _find(self, pattern: str, key: str) -> list[Path]:
        try:
            found = find_files(pattern, self.suffixes)
        except ConfigError as error:
            raise error.under(f"data.sources.{self.name}.{key}") from None
        self.names |= {path: name for name, path in found}
        return [path for _, path in found]

    def _digests(self, paths: list[Path]) -> Iterator[str]:
        for path in paths:
            try:
                yield path.suffix + sha256_file(path)
            except OSError as error:
                raise self._error("path", str(path), f"cannot be read: {error}") from None

    def _texts(self, paths: list[Path]) -> Iterator[str | None]:
        """Yield the text of each document in the files; None for a document to drop."""
        for path in paths:
            try:
                match file_format(path):
                    case FileFormat.jsonl:
                        yield from self._from_jsonl(path)
                    case FileFormat.parquet:
                        yield from self._from_parquet(path)
                    case FileFormat.text | None:
                        yield self._decode(read_document(path), str(path))
            except (OSError, UnreadableFile) as error:
                raise self._error("path", str(path), f"cannot be read: {error}") from None

    def _from_parquet(self, path: Path) -> Iterator[str | None]:
        import pyarrow

        types = pyarrow.types
        with open_parquet(path) as table:
            column = self._column(table.schema_arrow.names, str(path))
            kind = table.schema_arrow.field(column).type
            if types.is_dictionary(kind):  # as pandas stores categories
                kind = kind.value_type
            is_text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
            if not any(check(kind) for check in is_text):
                raise self._error("text_key", self.config.text_key, f"{path} holds {kind} there, not text")
            batches = table.iter_batches(columns=[column])
            contents = (one for batch in batches for one in batch.column(0).cast(pyarrow.large_binary()).to_pylist())
            for row, content in enumerate(contents):
                yield self._decode(content or b"", f"{path}, row {row}")

    def _from_jsonl(self, path: Path) -> Iterator[str | None]:
        for number, offset, content in json_lines(path):
            decoded = self._decode(content, str(path), offset)
            yield None if decoded is None else self._from_json(decoded, f"{path}:{number}")

    def _from_json(self, line: str, where: str) -> str | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # huge numbers and deep nesting raise other errors
            raise self._error("path", where, f"is not JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(record, dict):
            raise self._error("path", where, 'is not a JSON object such as {"text": "..."}')
        text = record[self._column(list(record), where)]
        if not isinstance(text, str | None):
            reason = f"{where} holds a {type(text).__name__} there, not text"
            raise self._error("text_key", self.config.text_key, reason)
        # JSON may escape half of a surrogate pair, which is not text either
        return self._decode((text or "").encode(errors="surrogatepass"), where)

    def _column(self, names: list[str], where: str) -> str:
        if self.config.text_key not in names:
            raise self._error("text_key", self.config.text_key, f"{where} has no such column", names)
        return self.config.text_key

    def _decode(self, content: bytes, where: str, offset: int = 0) -> str | None:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            match self.data.undecodable:
                case Undecodable.replace:
                    return content.decode(errors="replace")
                case Undecodable.drop:
                    return None
                case Undecodable.fail:
                    advice = ["data.undecodable=drop", "data.undecodable=replace"]
                    reason = f"byte {offset + error.start} is not UTF-8"
                    raise self._error("path", where, reason, advice) from None

    def _error(self, key: str, value: str, reason: str, advice: Sequence[str] = ()) -> ConfigError:
        return ConfigError(f"data.sources.{self.name}.{key}", value, reason, advice)


class PartsSource(FileSource):
    """Documents of text, pictures and videos. Paths of pictures start at the folder of their file."""

    suffixes = readers.SUFFIXES

    def fingerprint(self) -> str:
        """Hash the content and suffix of all files, and of the pictures that they name. Files that have not changed
        since the last start are not read.
        """
        settings = json.dumps(asdict(self.config.parts), sort_keys=True)
        key = sha256_text(self.name, str(self.config.path), str(self.config.held_out_path), settings, os.getcwd())
        known = FileDigests(Path(self.data.cache).expanduser() / "digests" / f"{key[:32]}.parquet")
        groups = (self.paths, self.held_out_paths)
        digests = [[one for path in paths for one in self._digests_of(path, known)] for paths in groups]
        known.save()
        return sha256_text(*digests[0], "|", *digests[1])

    def _digests_of(self, path: Path, known: FileDigests) -> Iterator[str]:
        """Yield the digest of a file, and for each picture that it names its digest, or why it is refused."""
        parts = self.config.parts
        with self._reading(path):
            yield path.suffix + known.of(path)
            for name in known.named(path, partial(readers.named_files, path, parts)):
                try:
                    yield known.of(find_inside(path.parent, name, parts.largest_bytes))
                except (OSError, RefusedRecord) as problem:
                    yield str(problem)

    def documents(self) -> Iterator[Document]:
        share = 0.0 if self.held_out_paths else self.data.held_out
        budget = Budget(self.config.max_bytes, share)
        for document in (one for path in self.paths for one in self._read(path, share)):
            if document.dropped or budget.take(document.text, document.held_out):
                yield document
            if budget.is_spent:
                break
        for path in self.held_out_paths:
            yield from (replace(document, held_out=True) for document in self._read(path, 0.0))

    def _read(self, path: Path, share: float) -> Iterator[Document]:
        for record in _usable(self._records(path), self.name, self.data):
            yield record if isinstance(record, Document) else document_of(record, share)

    def _records(self, path: Path) -> Iterator[PartsDocument | BadRecord]:
        most = _images(self.data).max_images
        with self._reading(path):
            yield from readers.read_documents(path, self.config.parts, name=self.names[path], most=most)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, UnreadableFile) as error:
            raise self._error("path", str(path), f"cannot be read: {error}") from None
        except ConfigError as error:
            raise (error if error.key.startswith("data.") else error.under(f"data.sources.{self.name}.parts")) from None


class HuggingFaceSource:
    """A data set streamed by the `datasets` library, in its own order. In a run with pictures (`data.images`) a data
    set whose columns hold documents of parts is read as such, and its pictures stay encoded.
    """

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        self.name, self.config, self.data, self.path = name, config, data, str(config.path)
        self.parts = replace(config.parts, text_key=config.text_key)

    def fingerprint(self) -> str:
        """Hash the name, or the files of a data set on disk. Content on the hub may change under its name."""
        return dataset_fingerprint(self.path, self.config.subset, self.config.split)

    def documents(self) -> Iterator[Document]:
        texts = map(self._text, self._rows()) if self.data.images is None else self._texts_and_pictures()
        try:
            yield from _documents(texts, self.data.held_out, self.config.max_bytes)
        except UnreadableFile as error:
            raise ConfigError(f"data.sources.{self.name}.path", self.path, f"cannot be read: {error}") from None
        except ConfigError as error:
            raise (error if error.key.startswith("data.") else error.under(f"data.sources.{self.name}")) from None

    def _rows(self) -> Iterator[dict[str, Any]]:
        return stream_dataset(self.path, self.config.subset, self.config.split)

    def _texts_and_pictures(self) -> Iterator[str | PartsDocument | Document]:
        """Yield documents of parts, or texts if the data set has no pictures."""
        tables = stream_tables(self.path, self.config.subset, self.config.split, _ROWS)
        first = next(tables, None)
        if first is None:
            return
        try:
            if not readers.holds_documents(first.schema, self.parts):
                yield from map(self._text, self._rows())
                return
            place, most = Path(self.path).expanduser(), _images(self.data).max_images
            folder = place if place.is_dir() else None
            records = readers.read_tables(
                chain([first], tables), first.schema, self.config.split, self.parts, folder, most
            )
            yield from _usable(records, self.name, self.data)
        except ConfigError as error:
            under_parts = error.key in ("image_key", "parts_key")
            raise (error.under("parts") if under_parts else error) from None

    def _text(self, row: dict[str, Any]) -> str:
        key = self.config.text_key
        if key not in row:
            raise ConfigError("text_key", key, "the data set has no such column", list(row))
        if not isinstance(row[key], str | None):
            raise ConfigError("text_key", key, f"the data set holds a {type(row[key]).__name__} there, not text")
        return row[key] or ""


class ImportedSource:
    """A source named by import path. Its class takes the source's `options`. `documents()` yields the same texts in the
    same order at each call, and `fingerprint()` returns a string that changes whenever the texts do. A document may
    also be a `PartsDocument`, with pictures and videos.
    """

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        self.name, self.config, self.data, self.key = name, config, data, f"data.sources.{name}.kind"
        needs = ("documents", "fingerprint")
        self.inner = construct(str(config.kind), self.key, options=config.options, needs=needs)

    def fingerprint(self) -> str:
        return sha256_text(str(self.config.kind), str(self.inner.fingerprint()))

    def documents(self) -> Iterator[Document]:
        return _documents(self._texts(), self.data.held_out, self.config.max_bytes)

    def _texts(self) -> Iterator[str | PartsDocument]:
        for text in self.inner.documents():
            if isinstance(text, PartsDocument) and self.data.images is None:
                raise ConfigError("data.images", None, f"sources.{self.name} has pictures", ["+data.images={}"])
            if not isinstance(text, str | PartsDocument):
                raise ConfigError(self.key, self.config.kind, f"documents() yielded a {type(text).__name__}, not text")
            yield text


def _images(data: DataConfig) -> ImagesConfig:
    assert data.images is not None  # `DataConfig` refuses documents of parts without it
    return data.images


def _usable(
    records: Iterable[PartsDocument | BadRecord], source: str, data: DataConfig
) -> Iterator[PartsDocument | Document]:
    """Yield the records that are documents. A bad one ends the command or, if such are dropped, is counted."""
    for record in records:
        if not isinstance(record, BadRecord):
            yield record
        elif _images(data).on_bad is BadMedia.drop:
            yield Document("", False, BAD_MEDIA)
        else:
            advice = ["data.images.on_bad=drop"]
            raise ConfigError(f"data.sources.{source}.path", record.id, printable(record.reason), advice)


def _documents(
    texts: Iterable[str | PartsDocument | Document | None], share: float, max_bytes: int | None
) -> Iterator[Document]:
    """Split texts into training and held-out documents, up to `max_bytes`."""
    budget = Budget(max_bytes, share)
    for text in texts:
        match text:
            case Document():
                document = text
            case PartsDocument():
                document = document_of(text, share)
            case _:
                document = _document(text, share)
        if document.dropped or budget.take(document.text, document.held_out):
            yield document
        if budget.is_spent:
            return


def document_of(record: PartsDocument, share: float) -> Document:
    """Make a document. Whether it is held out depends on its pictures or, without any, on its text, so that documents
    with the same first picture are on the same side.
    """
    if not record.parts:
        return Document("", False, EMPTY)
    origin = record.image_digests[0] if record.image_digests else record.digest
    return Document(record.text, is_held_out(origin, share), name=record.id, parts=record.parts)


def _document(text: str | None, share: float) -> Document:
    """Make a document. Whether it is held out depends on a hash of its text, so duplicates are on the same side."""
    if not text:
        return Document("", False, UNDECODABLE if text is None else EMPTY)
    return Document(text, is_held_out(hashlib.sha256(text.encode()).hexdigest(), share))
