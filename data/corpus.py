"""A corpus as the trainer sees it: a directory of token shards, their manifest and the tokenizer that made them.

`prepare` makes it or finds it in the cache; the key is a hash of everything that the tokens depend on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from core.config import plain
from core.errors import ConfigError, DataError
from core.files import new_directory, sha256_text, write_json
from data.config import DataConfig, LongDocuments, TokenizerKind
from data.sources import Document, Source, make_source
from data.tokenizer import Tokenizer, describe, from_file, load_tokenizer, train_bpe
from data.tokens import Shard, TokenStream, TokenWriter, token_dtype

TRAIN, HELD_OUT = "train", "held_out"
MANIFEST = "manifest.json"
_FORMAT = 1
_ENCODED_AT_ONCE = 256


class Corpus:
    """Token streams by source and split, opened from a directory."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self.sources = tuple(manifest["sources"])
        self.fingerprint = sha256_text(json.dumps(manifest, sort_keys=True))
        dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
        self._streams = {
            (name, split): TokenStream(directory, [Shard(**shard) for shard in part["shards"]], dtype)
            for name, parts in manifest["sources"].items()
            for split, part in parts.items()
        }

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory)

    def stream(self, source: str, split: str) -> TokenStream:
        if source not in self.sources:
            raise ConfigError(f"data.sources.{source}", None, "the corpus has no such source", self.sources)
        return self._streams[source, split]

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Hash this caller's share of the shards. Raises `DataError` with the file and the fix."""
        for stream in self._streams.values():
            stream.verify(part, parts)


def open_corpus(directory: Path) -> Corpus:
    """The corpus in `directory`. Raises `DataError` where a shard is missing or has another size."""
    path = directory / MANIFEST
    if not path.exists():
        raise ConfigError("data.tokens", str(directory), f"is no directory of tokens: {MANIFEST} is missing")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is damaged ({error}): remove {directory} and run again to make it anew") from None
    return Corpus(directory, manifest)


def prepare(config: DataConfig, report: Callable[[str], None]) -> Corpus:
    """Tokenise the sources, or open what was made of the same sources before. One process calls it."""
    if config.tokens:
        return open_corpus(Path(config.tokens).expanduser())
    cache = Path(config.cache).expanduser()
    sources = [make_source(name, part, config) for name, part in config.sources.items()]
    key = _source_key(config, sources)
    tokenizer = None
    if config.tokenizer.kind is not TokenizerKind.bpe:
        tokenizer = from_file(config.tokenizer)
        key = sha256_text(key, tokenizer.fingerprint)
    directory = cache / "tokens" / key[:32]
    if not (directory / MANIFEST).exists():
        if tokenizer is None:
            report(f"training a tokenizer of {config.tokenizer.vocab_size} tokens")
            tokenizer = train_bpe(_sample(sources, config.tokenizer.train_bytes), config.tokenizer, cache)
        with new_directory(directory) as scratch:
            _write(scratch, config, sources, tokenizer, report)
    return open_corpus(directory)


def _source_key(config: DataConfig, sources: list[Source]) -> str:
    """Everything the tokens depend on; shares of the blend do not change them."""
    settings = plain(config)
    for name in ("tokens", "verify", "cache"):
        del settings[name]
    for part in settings["sources"].values():
        del part["weight"]
    return sha256_text(str(_FORMAT), json.dumps(settings, sort_keys=True), *(source.fingerprint() for source in sources))


def _sample(sources: list[Source], size: int) -> Iterator[str]:
    """The first training documents of each source, an equal share of bytes each."""
    for source in sources:
        left = size // len(sources)
        for document in source.documents():
            if document.held_out or document.dropped:
                continue
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                break


def _write(
    directory: Path, config: DataConfig, sources: list[Source], tokenizer: Tokenizer, report: Callable[[str], None]
) -> None:
    manifest: dict[str, Any] = {"format": _FORMAT, "tokenizer": describe(tokenizer), "sources": {}}
    tokenizer.save(directory)
    for source in sources:
        writers = _SourceWriter(directory, config, source, tokenizer)
        documents = source.documents()
        while batch := list(islice(documents, _ENCODED_AT_ONCE)):
            writers.add(batch)
            report(f"tokenising {source.name}: {sum(w.tokens for w in writers.streams.values()):,} tokens")
        manifest["sources"][source.name] = writers.close()
    write_json(directory / MANIFEST, manifest)


class _SourceWriter:
    """Both splits of one source on their way to disk, and the counts that the manifest keeps."""

    def __init__(self, directory: Path, config: DataConfig, source: Source, tokenizer: Tokenizer) -> None:
        self.config, self.source, self.tokenizer = config, source, tokenizer
        dtype = token_dtype(tokenizer.vocab_size)
        self.streams = {s: TokenWriter(directory, f"{source.name}-{s}", dtype) for s in (TRAIN, HELD_OUT)}
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in self.streams}

    def add(self, documents: list[Document]) -> None:
        whole = [document for document in documents if document.dropped is None]
        for document in documents:
            if document.dropped is not None:
                self.counts[_split(document)][f"dropped_{document.dropped}"] += 1
        for document, ids in zip(whole, self.tokenizer.encode([d.text for d in whole]), strict=True):
            counts = self.counts[_split(document)]
            kept = self._limit(ids, counts)
            if kept is not None:
                counts["documents"] += 1
                counts["bytes"] += len(document.text.encode())
                self.streams[_split(document)].add([self.tokenizer.bos_id, *kept, self.tokenizer.eos_id])

    def close(self) -> dict[str, Any]:
        if not self.counts[TRAIN]["documents"]:
            raise ConfigError(f"data.sources.{self.source.name}", None, "has no text to train on")
        found = {}
        for split, stream in self.streams.items():
            shards = [asdict(shard) for shard in stream.close()]
            found[split] = {"tokens": stream.tokens, **self.counts[split], "shards": shards}
        return {split: {"shards": part.pop("shards"), "counts": part} for split, part in found.items()}

    def _limit(self, ids: Any, counts: Counter[str]) -> Any:
        limit, policy = self.config.limit_tokens, self.config.long_documents
        if limit is None or len(ids) <= limit or policy is LongDocuments.split:
            return ids
        if policy is LongDocuments.refuse:
            reason = f"data.sources.{self.source.name} has a document of {len(ids)} tokens"
            raise ConfigError("data.limit_tokens", limit, f"{reason}; raise the limit or set data.long_documents",
                              ["split", "truncate", "drop"])
        counts[f"long_{policy.name}"] += 1
        return ids[:limit] if policy is LongDocuments.truncate else None


def _split(document: Document) -> str:
    return HELD_OUT if document.held_out else TRAIN
