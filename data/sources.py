"""Where documents come from. A source is read twice at most: a sample for the tokenizer, then everything.

Each document is on one side of the held-out split for ever: a hash of its origin decides, not its place.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from core.errors import ConfigError
from core.files import files_in, files_like, locate, opened, sha256_file, sha256_text, unzipped
from core.import_path import construct
from data import builtin
from data.config import DataConfig, Section, SourceConfig, SourceKind, Undecodable
from data.sampling import key_of

UNDECODABLE, EMPTY = "undecodable", "empty"
TEXT_SUFFIXES = frozenset({".txt", ".md", ".py", ".rst"})


@dataclass(frozen=True)
class Document:
    """`dropped` says why a document without text is passed on all the same: it is counted. `name`: what its source
    calls it, where it has a name.
    """

    text: str
    held_out: bool
    dropped: str | None = None
    name: str | None = None


class Source(Protocol):
    name: str

    def fingerprint(self) -> str:
        """Changes whenever the documents could."""
        ...

    def documents(self) -> Iterator[Document]: ...


def make_source(name: str, config: SourceConfig, data: DataConfig) -> Source:
    """Check that the source is there and return it. Raises `ConfigError` with the key and the fix."""
    if isinstance(config.kind, str):
        return ImportedSource(name, config, data)
    kinds: dict[SourceKind, Any] = {
        SourceKind.builtin: BuiltinSource,
        SourceKind.files: FileSource,
        SourceKind.huggingface: HuggingFaceSource,
    }
    return kinds[config.kind](name, config, data)


def is_held_out(origin: str, share: float) -> bool:
    """Whether a document of this origin is kept from training, for a share of all origins."""
    return key_of("held out", origin) < share * 2**64


class BuiltinSource:
    """One section of the standard library, in an order that mixes its packages; a cap keeps the first documents."""

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        assert config.section is not None
        self.name, self.config, self.section, self.share = name, config, config.section, data.held_out
        self._files = sorted(builtin.files(self.section), key=lambda file: key_of(file.origin, file.name))
        if not self._files:
            reason = f"this Python has no {self.section.name} (slim images leave some out): add ~data.sources.{name}"
            raise ConfigError(f"data.sources.{name}.section", self.section, reason)

    def fingerprint(self) -> str:
        return sha256_text(*(f"{file.name}:{hashlib.sha256(file.content).hexdigest()}" for file in self._files))

    def documents(self) -> Iterator[Document]:
        budget = Budget(self.config.max_bytes, self.share)
        kept_back = self._held_out_paragraphs()
        for file in self._files:
            held_out = is_held_out(file.origin, self.share)
            if budget.left[held_out] == 0:
                continue
            text = builtin.text_of(file, self.section)
            if text is None:
                yield Document("", held_out, UNDECODABLE)
                continue
            if kept_back and not held_out:
                text = builtin.without_paragraphs(text, kept_back)
            if text and budget.take(text, held_out):
                yield Document(text, held_out, name=file.name)

    def _held_out_paragraphs(self) -> set[str]:
        """Of pydoc's topics, which repeat each other; files are told apart by their content already."""
        if self.section is not Section.pydoc:
            return set()
        held_out = (file for file in self._files if is_held_out(file.origin, self.share))
        return {p for file in held_out for p in builtin.paragraphs(file.content.decode())}


class Budget:
    """Cuts a source off at `max_bytes` of training text and as much held-out text as the split's share makes of it."""

    def __init__(self, max_bytes: int | None, share: float) -> None:
        self.left = {False: max_bytes, True: None if max_bytes is None else int(max_bytes * share / (1 - share))}

    def take(self, text: str, held_out: bool) -> bool:
        left = self.left[held_out]
        if left is None:
            return True
        if left == 0:
            return False
        self.left[held_out] = max(0, left - len(text.encode()))
        return True

    @property
    def spent(self) -> bool:
        return all(left == 0 for left in self.left.values())


class FileSource:
    """Files by suffix: .parquet, .jsonl, .jsonl.gz, and text (.txt .md .py .rst), one document a file."""

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        self.name, self.config, self.data = name, config, data
        self.held_out_paths = self._find(config.held_out_path, "held_out_path") if config.held_out_path else []
        kept_back = {path.resolve() for path in self.held_out_paths}  # they may lie in the folder of the others
        self.paths = [path for path in self._find(str(config.path), "path") if path.resolve() not in kept_back]

    def fingerprint(self) -> str:
        """By content and suffix, which says how to read it, so that touching a file changes nothing. Where hashing
        terabytes at every start is too slow, tokenise once and name the result (`data.tokens`).
        """
        return sha256_text(*self._digests(self.paths), "|", *self._digests(self.held_out_paths))

    def documents(self) -> Iterator[Document]:
        share = 0.0 if self.held_out_paths else self.data.held_out
        budget = Budget(self.config.max_bytes, share)
        for path in self.paths:
            for text in self._texts(path):
                document = _document(text, share)
                if document.dropped or budget.take(document.text, document.held_out):
                    yield document
                if budget.spent:
                    return (yield from self._held_out())
        yield from self._held_out()

    def _held_out(self) -> Iterator[Document]:
        for path in self.held_out_paths:
            for text in self._texts(path):
                yield replace(_document(text, 0.0), held_out=True)

    def _find(self, pattern: str, key: str) -> list[Path]:
        try:
            path = locate(pattern)
        except ConfigError as error:
            raise error.under(f"data.sources.{self.name}.{key}") from None
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = [file for file in files_in(path) if _kind(file)]
        else:
            found = files_like(path)
        if not found:
            reason = "holds no parquet, jsonl or text file" if path.is_dir() else "no such file or folder"
            raise ConfigError(f"data.sources.{self.name}.{key}", pattern, reason)
        for unknown in (p for p in found if not _kind(p)):
            legal = [".parquet", ".jsonl", ".jsonl.gz", *sorted(TEXT_SUFFIXES)]
            raise ConfigError(f"data.sources.{self.name}.{key}", str(unknown), "unknown suffix", legal)
        return found

    def _digests(self, paths: list[Path]) -> Iterator[str]:
        for path in paths:
            try:
                yield path.suffix + sha256_file(path)
            except OSError as error:
                raise self._unreadable(str(path), f"cannot be read: {_first_line(error)}") from None

    def _texts(self, path: Path) -> Iterator[str | None]:
        """Texts of a file; None for one that is to be dropped."""
        readers = {"parquet": self._parquet, "jsonl": self._json_lines, "text": self._text_file}
        try:
            yield from readers[str(_kind(path))](path)
        except (OSError, EOFError, zlib.error) as error:
            raise self._unreadable(str(path), f"cannot be read: {_first_line(error)}") from None

    def _text_file(self, path: Path) -> Iterator[str | None]:
        yield self._decode(path.read_bytes(), str(path), 0)

    def _parquet(self, path: Path) -> Iterator[str | None]:
        import pyarrow
        import pyarrow.parquet

        types = pyarrow.types
        texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
        try:
            with opened(path) as source:
                file = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
                column = self._column(file.schema_arrow.names, str(path))
                kind = file.schema_arrow.field(column).type
                if not any(is_text(kind) for is_text in texts):
                    raise self._no_text(f"{path} holds {kind} there, not text")
                row = 0
                for batch in file.iter_batches(columns=[column]):
                    for content in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        yield self._decode(content or b"", f"{path}, row {row}", 0)
                        row += 1
        except pyarrow.ArrowException as error:
            raise self._unreadable(str(path), f"is no readable parquet file: {_first_line(error)}") from None

    def _json_lines(self, path: Path) -> Iterator[str | None]:
        offset = 0
        with unzipped(path) as file:
            for number, line in enumerate(file, start=1):
                decoded = self._decode(line, str(path), offset)
                offset += len(line)
                if decoded is None:
                    yield None
                elif decoded.strip():
                    yield self._record(decoded, f"{path}:{number}")

    def _record(self, line: str, where: str) -> str | None:
        """The text of one line of JSON."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # endless numbers and nesting have errors of their own
            raise self._unreadable(where, f"is not JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(record, dict):
            raise self._unreadable(where, 'is no JSON object, such as {"text": "..."}')
        text = record[self._column(list(record), where)]
        if not isinstance(text, str | None):
            raise self._no_text(f"{where} holds a {type(text).__name__} there, not text")
        # JSON may escape half of a surrogate pair, which is no text either
        return self._decode((text or "").encode(errors="surrogatepass"), where, 0)

    def _column(self, names: list[str], where: str) -> str:
        if self.config.text_key not in names:
            raise ConfigError(
                f"data.sources.{self.name}.text_key", self.config.text_key, f"{where} has no such column", names
            )
        return self.config.text_key

    def _decode(self, content: bytes, where: str, offset: int) -> str | None:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            policy = self.data.undecodable
            if policy is Undecodable.replace:
                return content.decode(errors="replace")
            if policy is Undecodable.drop:
                return None
            advice = ["data.undecodable=drop", "data.undecodable=replace"]
            raise self._unreadable(where, f"byte {offset + error.start} is not UTF-8", advice) from None

    def _unreadable(self, where: str, reason: str, advice: Sequence[str] = ()) -> ConfigError:
        return ConfigError(f"data.sources.{self.name}.path", where, reason, advice)

    def _no_text(self, reason: str) -> ConfigError:
        return ConfigError(f"data.sources.{self.name}.text_key", self.config.text_key, reason)


class HuggingFaceSource:
    """A data set streamed by the `datasets` library, in its own order: what is permuted are packed rows."""

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        self.name, self.config, self.data = name, config, data

    def fingerprint(self) -> str:
        """By name, or by the files of a data set on disk. A hub's data set may change under its name; the manifest of
        the tokens made from it does not.
        """
        folder = Path(str(self.config.path))
        return data_set_fingerprint(folder, str(self.config.path), str(self.config.subset), self.config.split)

    def documents(self) -> Iterator[Document]:
        budget = Budget(self.config.max_bytes, self.data.held_out)
        for record in self._stream():
            key = f"data.sources.{self.name}.text_key"
            if self.config.text_key not in record:
                raise ConfigError(key, self.config.text_key, "the data set has no such column", list(record))
            text = record[self.config.text_key] or ""
            if not isinstance(text, str):
                raise ConfigError(key, self.config.text_key, f"the data set has {type(text).__name__} there, not text")
            document = _document(text, self.data.held_out)
            if document.dropped or budget.take(text, document.held_out):
                yield document
            if budget.spent:
                return

    def _stream(self) -> Iterator[dict[str, Any]]:
        import datasets

        try:
            yield from datasets.load_dataset(
                str(self.config.path), self.config.subset, split=self.config.split, streaming=True
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = f"datasets cannot stream it: {_first_line(error)}"
            raise ConfigError(f"data.sources.{self.name}.path", self.config.path, reason) from None


class ImportedSource:
    """A source by import path. Its class takes the source's `options`; `documents()` yields texts, the same ones in the
    same order each time, and `fingerprint()` returns a string that changes whenever they do.
    """

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        self.name, self.config, self.data, self.key = name, config, data, f"data.sources.{name}.kind"
        needs = ("documents", "fingerprint")
        self.inner = construct(str(config.kind), self.key, options=config.options, needs=needs)

    def fingerprint(self) -> str:
        return sha256_text(str(self.config.kind), str(self.inner.fingerprint()))

    def documents(self) -> Iterator[Document]:
        budget = Budget(self.config.max_bytes, self.data.held_out)
        for text in self.inner.documents():
            if not isinstance(text, str):
                raise ConfigError(self.key, self.config.kind, f"documents() yielded a {type(text).__name__}, not text")
            document = _document(text, self.data.held_out)
            if document.dropped or budget.take(document.text, document.held_out):
                yield document
            if budget.spent:
                return


def data_set_fingerprint(folder: Path, *names: str) -> str:
    """Of a data set for the `datasets` library: what it is called and, where it is a folder, the files in it."""
    return sha256_text(*names, *map(sha256_file, files_in(folder) if folder.is_dir() else []))


def _kind(path: Path) -> str | None:
    name = path.name
    if name.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    return {".parquet": "parquet"}.get(path.suffix, "text" if path.suffix in TEXT_SUFFIXES else None)


def _document(text: str | None, share: float) -> Document:
    """Side of the split by a hash of the text itself, so that copies are on one side."""
    if not text:
        return Document("", False, UNDECODABLE if text is None else EMPTY)
    return Document(text, is_held_out(hashlib.sha256(text.encode()).hexdigest(), share))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
