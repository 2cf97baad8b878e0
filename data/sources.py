"""Where documents come from. A source is read twice at most: a sample for the tokenizer, then everything.

Each document is on one side of the held-out split for ever: a hash of its origin decides, not its place.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from core.errors import ConfigError
from core.files import sha256_file, sha256_text
from data import builtin
from data.config import DataConfig, Section, SourceConfig, SourceKind, Undecodable
from data.order import key_of

TEXT_SUFFIXES = frozenset({".txt", ".md", ".py", ".rst"})


@dataclass(frozen=True)
class Document:
    """`dropped` says why a document without text is passed on all the same: it is counted."""

    text: str
    held_out: bool
    dropped: str | None = None


class Source(Protocol):
    name: str

    def fingerprint(self) -> str:
        """Changes whenever the documents could."""
        ...

    def documents(self) -> Iterator[Document]: ...


def make_source(name: str, config: SourceConfig, data: DataConfig) -> Source:
    """Check that the source is there and return it. Raises `ConfigError` with the key and the fix."""
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
    """One section of the standard library, in an order that mixes its packages; capped, it keeps the first documents."""

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        assert config.section is not None
        self.name, self.config, self.section, self.share = name, config, config.section, data.held_out
        self._files = sorted(builtin.files(self.section), key=lambda file: key_of(file.origin, file.name))
        if not self._files:
            reason = f"this Python has no {self.section.name} (slim images leave some out): remove the source"
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
            if kept_back and not held_out:
                text = builtin.without_paragraphs(text, kept_back)
            if text and budget.take(text, held_out):
                yield Document(text, held_out)

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
        self.paths = self._find(str(config.path), "path")
        self.held_out_paths = self._find(config.held_out_path, "held_out_path") if config.held_out_path else []

    def fingerprint(self) -> str:
        """By content: renaming a folder changes nothing, touching a file neither."""
        return sha256_text(*(sha256_file(path) for path in [*self.paths, *self.held_out_paths]))

    def documents(self) -> Iterator[Document]:
        budget = Budget(self.config.max_bytes, self.data.held_out)
        for path in self.paths:
            for text in self._texts(path):
                held_out = not self.held_out_paths and is_held_out(_text_key(text), self.data.held_out)
                if text is None:
                    yield Document("", False, "undecodable")
                elif budget.take(text, held_out):
                    yield Document(text, held_out)
            if budget.spent:
                break
        for path in self.held_out_paths:
            for text in self._texts(path):
                yield Document(text or "", True, None if text is not None else "undecodable")

    def _find(self, pattern: str, key: str) -> list[Path]:
        where = f"data.sources.{self.name}.{key}"
        path = Path(pattern).expanduser()
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
        else:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            reason = "holds no parquet, jsonl or text file" if path.is_dir() else "no such file or folder"
            raise ConfigError(where, pattern, reason)
        unknown = [p for p in found if not _kind(p)]
        if unknown:
            raise ConfigError(where, str(unknown[0]), "unknown suffix", [".parquet", ".jsonl", ".jsonl.gz", *sorted(TEXT_SUFFIXES)])
        return found

    def _texts(self, path: Path) -> Iterator[str | None]:
        """Texts of a file; None for one that is to be dropped."""
        kind = _kind(path)
        if kind == "parquet":
            yield from self._parquet(path)
        elif kind == "jsonl":
            opener: Any = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rb") as file:
                yield from self._json_lines(path, file)
        else:
            text = self._decode(path.read_bytes(), path, 0)
            if text != "":
                yield text

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ConfigError(f"data.sources.{self.name}.path", str(path), f"is not a readable parquet file: {error}") from None
        self._check_key(file.schema_arrow.names, path)
        for batch in file.iter_batches(columns=[self.config.text_key]):
            yield from (text for text in batch.column(0).to_pylist() if text)

    def _json_lines(self, path: Path, file: IO[bytes]) -> Iterator[str | None]:
        offset = 0
        for number, line in enumerate(file, start=1):
            decoded = self._decode(line, path, offset)
            offset += len(line)
            if decoded is None:
                yield None
            elif decoded.strip():
                try:
                    record = json.loads(decoded)
                except json.JSONDecodeError as error:
                    where = f"data.sources.{self.name}.path"
                    raise ConfigError(where, f"{path}:{number}", f"is not JSON ({error.msg})") from None
                self._check_key(list(record) if isinstance(record, dict) else [], path)
                if record[self.config.text_key]:
                    yield str(record[self.config.text_key])

    def _check_key(self, names: list[str], path: Path) -> None:
        if self.config.text_key not in names:
            key = f"data.sources.{self.name}.text_key"
            raise ConfigError(key, self.config.text_key, f"{path} has no such column", names)

    def _decode(self, content: bytes, path: Path, offset: int) -> str | None:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            policy = self.data.undecodable
            if policy is Undecodable.replace:
                return content.decode(errors="replace")
            if policy is Undecodable.drop:
                return None
            reason = f"byte {offset + error.start} is not UTF-8; set data.undecodable"
            where = f"data.sources.{self.name}.path"
            raise ConfigError(where, str(path), reason, ["data.undecodable=drop", "data.undecodable=replace"]) from None


class HuggingFaceSource:
    """A data set streamed by the `datasets` library, in its own order: what is permuted are packed rows."""

    def __init__(self, name: str, config: SourceConfig, data: DataConfig) -> None:
        self.name, self.config, self.data = name, config, data

    def fingerprint(self) -> str:
        """By name, or by the files of a data set on disk. A hub's data set may change under its name; the manifest of
        the tokens made from it does not.
        """
        path = Path(str(self.config.path))
        local = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        names = (str(self.config.path), str(self.config.subset), self.config.split)
        return sha256_text(*names, *(sha256_file(p) for p in local))

    def documents(self) -> Iterator[Document]:
        budget = Budget(self.config.max_bytes, self.data.held_out)
        for record in self._stream():
            text = record.get(self.config.text_key)
            if text is None:
                key = f"data.sources.{self.name}.text_key"
                raise ConfigError(key, self.config.text_key, "the data set has no such column", list(record))
            held_out = is_held_out(_text_key(text), self.data.held_out)
            if text and budget.take(text, held_out):
                yield Document(text, held_out)
            if budget.spent:
                return

    def _stream(self) -> Iterator[dict[str, Any]]:
        import datasets

        try:
            yield from datasets.load_dataset(
                str(self.config.path), self.config.subset, split=self.config.split, streaming=True
            )
        except (FileNotFoundError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
            reason = f"datasets cannot stream it: {str(error).splitlines()[0]}"
            raise ConfigError(f"data.sources.{self.name}.path", self.config.path, reason) from None


def _kind(path: Path) -> str | None:
    name = path.name
    if name.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    return {".parquet": "parquet"}.get(path.suffix, "text" if path.suffix in TEXT_SUFFIXES else None)


def _text_key(text: str | None) -> str:
    return hashlib.sha256((text or "").encode()).hexdigest()
