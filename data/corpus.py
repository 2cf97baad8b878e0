"""Prepare a corpus: a directory of token shards, their manifest and the tokenizer that made them.

The cache key is a hash of everything that the tokens depend on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.config import plain
from core.errors import ConfigError, DataError
from core.files import misfit, new_directory, read_json, sha256_text, write_json
from data.config import DataConfig, LongDocuments, Packing, SourceKind, TokenizerKind
from data.files import skipped_files
from data.filter.config import without_defaults
from data.filter.corpus import SourcePart, describe_filter, filter_sources, rules_fingerprint
from data.filter.score.factory import Models
from data.images.batch import TileRef
from data.images.config import BadMedia
from data.images.decode import pillow
from data.images.media import BadMediaError, EncodedPicture, ImageDescription, ImageSpelling, spell
from data.images.parts import VideoPart
from data.images.store import PictureStream, PictureWriter
from data.packing import PackedSequence, Packer, PlacedPicture, why_no_pair
from data.sources import BAD_MEDIA, Document, Source, make_source, may_have_pictures
from data.tokenizer import Tokenizer, from_file, load_tokenizer, train_bpe
from data.tokens import Shard, TokenStream, TokenWriter, rebuild, token_dtype, verify_shard

TRAIN, HELD_OUT = "train", "held_out"
MANIFEST = "manifest.json"
DOCUMENTS = "-documents.parquet"
_FORMAT = 1
_SHARD = {"file": str, "tokens": int, "sha256": str}
_PICTURES = {"file": str, "bytes": int, "index": str, "index_sha256": str, "count": int}
_SPLIT = {"shards": [_SHARD], "counts": {"tokens": int, str: int}, "pictures?": _PICTURES}
_SHAPE = {
    "tokenizer": {"vocab_size": int, "fingerprint": str},
    "packing?": {"row_tokens": int, "kind?": str},
    "images?": ImageDescription.SHAPE,
    "sources": {str: {TRAIN: _SPLIT, HELD_OUT: _SPLIT}},
}
_ENCODED_AT_ONCE = 1 << 22
"""Characters to encode at once: enough to keep the encoder's threads busy, few enough to fit in memory."""


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
        self.images = None if "images" not in manifest else ImageDescription.read(manifest["images"])
        self._pictures = {}
        if self.images is not None:
            self._pictures = {
                f"{name}-{split}": PictureStream(directory, part["pictures"], f"{name}-{split}", self.images)
                for name, parts in manifest["sources"].items()
                for split, part in parts.items()
                if "pictures" in part
            }

    @cached_property
    def tokenizer(self) -> Tokenizer:
        try:
            tokenizer = load_tokenizer(self.directory)
        except DataError as error:
            raise DataError(f"{error}: {rebuild(self.directory)}") from None
        if tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            reason = "holds another tokenizer than the one that made its tokens"
            raise DataError(f"{self.directory} {reason}: {rebuild(self.directory)}")
        return tokenizer

    def stream(self, source: str, split: str) -> TokenStream:
        if source not in self.sources:
            raise ConfigError(f"data.sources.{source}", None, "the corpus has no such source", self.sources)
        return self._streams[source, split]

    def pictures(self, source: str, split: str) -> PictureStream | None:
        """Return the pictures of a stream, or None if it has none."""
        return self._pictures.get(f"{source}-{split}")

    def decode(self, tile: TileRef) -> NDArray[np.uint8]:
        """Return a tile, uint8 [3, S, S]."""
        return self._pictures[tile.stream].decode(tile)

    @property
    def is_padded(self) -> bool:
        """Whether EOS may be repeated between documents, as padding."""
        return "align" in self.manifest or self.packed_seq_len is not None

    @property
    def packed_seq_len(self) -> int | None:
        """The only sequence length with which a packed corpus can be read; None: any."""
        return self.manifest.get("packing", {}).get("row_tokens")

    @property
    def has_pairs(self) -> bool:
        """Whether each sequence is an image-caption pair."""
        return bool(self.manifest.get("packing", {}).get("kind") == Packing.pairs.name)

    def padding(self, source: str) -> float:
        """Return the fraction of a source's training tokens that is padding."""
        counts = self._counts(source)
        return counts.get("padding", 0) / max(counts["tokens"], 1)

    def image_tokens(self, source: str) -> float:
        """Return the fraction of a source's training tokens that stand for parts of pictures."""
        pictures = self.pictures(source, TRAIN)
        count = 0 if pictures is None else pictures.num_tiles * pictures.config.tokens_per_tile
        return count / max(self._counts(source)["tokens"], 1)

    def cut_documents(self, source: str) -> float:
        """Return the fraction of a source's training documents that span several sequences (`data.pack_seq_len`)."""
        counts = self._counts(source)
        return counts.get("cut", 0) / max(counts.get("documents", 0), 1)

    def _counts(self, source: str) -> dict[str, int]:
        return self.manifest["sources"][source][TRAIN]["counts"]

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Verify the hashes of every `parts`-th shard from shard `part` on, and of a share of the pictures. `DataError`
        names the file and the fix.
        """
        shards = [shard for stream in self._streams.values() for shard in stream.shards]
        for shard in shards[part::parts]:
            verify_shard(self.directory, shard)
        for number, pictures in enumerate(self._pictures.values()):
            for problem in pictures.verify((part - number) % parts, parts):
                raise DataError(f"{problem}: {rebuild(self.directory)}")
        if self.images is not None and self._pictures:
            self.images.check_decoder()


def open_corpus(directory: Path) -> Corpus:
    """Open the corpus in `directory`. Raises `DataError` for a damaged manifest, or a shard that is missing or has the
    wrong size.
    """
    path = directory / MANIFEST
    try:
        manifest = read_json(path, {"format": int})
        if manifest["format"] == _FORMAT:
            if problem := misfit(manifest, _SHAPE):
                raise ValueError(problem)
            return Corpus(directory, manifest)
        reason = f"has format {manifest['format']}, not {_FORMAT}"
    except (OSError, ValueError, TypeError) as error:
        reason = f"cannot be read ({type(error).__name__}: {error})"
    raise DataError(f"{path} {reason}: {rebuild(directory)}")


def find_corpus(cache: Path, fingerprint: str) -> Corpus | None:
    """Return the corpus with this fingerprint from a cache, or None."""
    for manifest in sorted((cache.expanduser() / "tokens").glob(f"*/{MANIFEST}")):
        try:
            corpus = open_corpus(manifest.parent)
        except DataError:
            continue
        if corpus.fingerprint == fingerprint:
            return corpus
    return None


def check_found(config: DataConfig) -> None:
    """Raise `ConfigError` if the tokens, the files of a source or the tokenizer are not there."""
    if config.tokens:
        _tokens_directory(config.tokens)
        return
    for name, part in config.sources.items():
        if part.kind in (SourceKind.files, SourceKind.documents):
            make_source(name, part, config)
    if config.images is not None:
        pillow()
    if config.tokenizer.kind is not TokenizerKind.bpe:
        tokenizer = from_file(config.tokenizer)
        if config.images is not None:
            ImageSpelling(config.images, tokenizer.special_id)


def prepare(config: DataConfig, report: Callable[[str], None], models: Models | None = None) -> Corpus:
    """Tokenise the sources, or open the corpus made from the same sources before. Only one process may call it.

    `report` gets lines of progress; `models` opens models for a filter that scores by their loss. Raises `ConfigError`
    with the key of an invalid source, `DataError` if a cached corpus is damaged or a new one cannot be written.
    """
    if config.tokens:
        return open_corpus(_tokens_directory(config.tokens))
    cache = Path(config.cache).expanduser()
    sources = [make_source(name, part, config) for name, part in config.sources.items()]
    fingerprints = [source.fingerprint() for source in sources]  # may hash all of the files
    key = _cache_key(config, fingerprints)
    tokenizer = None
    if config.tokenizer.kind is not TokenizerKind.bpe:
        tokenizer = from_file(config.tokenizer)
        key = sha256_text(key, tokenizer.fingerprint)
    directory = cache / "tokens" / key[:32]
    if not directory.exists():
        for line in _skipped_lines(config):
            report(line)
        try:
            if tokenizer is None:
                report(f"training a tokenizer of {config.tokenizer.vocab_size} tokens")
                sample = _sample(sources, config.tokenizer.train_bytes)
                specials = [] if config.images is None else config.images.tokens.names
                tokenizer = train_bpe(sample, config.tokenizer, cache, specials)
            if config.filter is not None:
                parts = [
                    SourcePart(source, fingerprint, config.images if may_have_pictures(one) else None)
                    for source, fingerprint, one in zip(sources, fingerprints, config.sources.values(), strict=True)
                ]
                sources = filter_sources(parts, config.filter, tokenizer, cache, report, models)
            with new_directory(directory) as scratch:
                _write(scratch, config, sources, tokenizer, report)
        except OSError as error:
            raise DataError(f"cannot make {directory} ({error}): free some space or set data.cache") from error
    corpus = open_corpus(directory)
    for name, splits in corpus.manifest["sources"].items():
        if config.held_out and not splits[HELD_OUT]["counts"]["tokens"]:
            report(f"data.sources.{name}: no document is held out (data.held_out={config.held_out})")
    for line in _packing_lines(config, corpus):
        report(line)
    return corpus


def _tokens_directory(text: str) -> Path:
    given = Path(text).expanduser()
    if not (given / MANIFEST).exists():
        advice = "make one with `leviathan tokenize`, or name the place to which it was moved"
        reason = f"is not a directory of tokens ({MANIFEST} is missing): {advice}"
        raise ConfigError("data.tokens", text, reason)
    return given


def _skipped_lines(config: DataConfig) -> Iterator[str]:
    for name, part in config.sources.items():
        if part.kind is SourceKind.files and (skipped := skipped_files(str(part.path))):
            named = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
            yield f"data.sources.{name}: files of unknown suffixes are skipped ({len(skipped)}): {named}"


def _packing_lines(config: DataConfig, corpus: Corpus) -> Iterator[str]:
    padding = {name: f"{corpus.padding(name):.1%}" for name in corpus.sources}
    if config.align is not None:
        shares = ", ".join(f"{share} of {name}" for name, share in padding.items())
        yield f"documents aligned to {config.align} tokens: padding {shares}"
    if config.pack_seq_len is not None:
        cut = {name: f"{corpus.cut_documents(name):.1%} of documents cut" for name in corpus.sources}
        shares = "; ".join(f"{name}: {cut[name]}, {share} padding" for name, share in padding.items())
        yield f"sequences of {config.pack_seq_len} tokens, {config.packing.name}: {shares}"
    if corpus.has_pairs:
        for name, splits in corpus.manifest["sources"].items():
            counts = Counter(splits[TRAIN]["counts"]) + Counter(splits[HELD_OUT]["counts"])
            for key, count in counts.items():
                if key.startswith("dropped_"):
                    what = key.removeprefix("dropped_").replace("_", " ")
                    yield f"data.sources.{name}: {count:,} of its documents are no pairs and were dropped ({what})"


def _cache_key(config: DataConfig, fingerprints: Sequence[str]) -> str:
    """Hash everything that the tokens depend on. They do not depend on the weights of the sources."""
    settings = plain(config)
    for name in ("tokens", "verify", "cache", "prefetch"):
        del settings[name]
    for part in settings["sources"].values():
        del part["weight"], part["max_epochs"]
        if not part["options"]:
            del part["options"]
        is_dataset = part["kind"] == SourceKind.huggingface.name and config.images is not None
        if part["kind"] != SourceKind.documents.name and not is_dataset:
            del part["parts"]
    if config.packing is Packing.greedy:
        del settings["packing"]
    if settings["filter"] is not None:
        settings["filter"] = without_defaults(settings["filter"])
    for name in ("align", "pack_seq_len", "filter", "images"):
        if settings[name] is None:  # corpora made before these settings existed stay valid
            del settings[name]
    if config.filter is not None:
        fingerprints = [*fingerprints, rules_fingerprint(config.filter)]
    return sha256_text(str(_FORMAT), json.dumps(settings, sort_keys=True), *fingerprints)


def _sample(sources: list[Source], size: int) -> Iterator[str]:
    """Yield the first training documents of the sources: `size` characters in all, an equal number from each source."""
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
    identity = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    manifest: dict[str, Any] = {"format": _FORMAT, "tokenizer": identity, "sources": {}}
    if config.align is not None:
        manifest["align"] = config.align
    if config.packing.has_seq_len:
        manifest["packing"] = {"kind": config.packing.name, "row_tokens": config.pack_seq_len}
    if config.filter is not None:
        manifest["filter"] = describe_filter(sources, directory)
    images = None if config.images is None else ImageSpelling(config.images, tokenizer.special_id)
    if images is not None:
        manifest["images"] = images.describe()
    tokenizer.save(directory)
    for source in sources:
        writer = _SourceWriter(directory, config, source, tokenizer, images)
        for batch in _batches(source.documents()):
            writer.add(batch)
            report(f"tokenising {source.name}: {writer.tokens:,} tokens")
        manifest["sources"][source.name] = writer.close()
    write_json(directory / MANIFEST, manifest)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + sum(len(p.data) for p in document.parts or () if not isinstance(p, str))
        has_video = any(isinstance(part, VideoPart) for part in document.parts or ())  # its frames take much memory
        if size >= _ENCODED_AT_ONCE or has_video:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SourceWriter:
    """Write both splits of one source, and count what the manifest records."""

    def __init__(
        self, directory: Path, config: DataConfig, source: Source, tokenizer: Tokenizer, images: ImageSpelling | None
    ) -> None:
        self.config, self.source, self.tokenizer, self._images = config, source, tokenizer, images
        dtype = token_dtype(tokenizer.vocab_size)
        self.streams = {s: TokenWriter(directory, f"{source.name}-{s}", dtype) for s in (TRAIN, HELD_OUT)}
        self.pictures = {split: PictureWriter(directory, f"{source.name}-{split}") for split in self.streams}
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in self.streams}
        self.index = DocumentIndex(directory / f"{source.name}{DOCUMENTS}")
        self.packer = None
        self.packed_seq_len = config.pack_seq_len if config.packing.has_seq_len else None
        if config.packing is Packing.best_fit and config.pack_seq_len is not None:
            self.packer = Packer(config.pack_seq_len, tokenizer.bos_id, tokenizer.eos_id)
        self.pairs_only = config.packing is Packing.pairs

    @property
    def tokens(self) -> int:
        """Tokens so far, also those that wait to be packed."""
        waiting = 0 if self.packer is None else self.packer.waiting_tokens
        return waiting + sum(stream.tokens for stream in self.streams.values())

    def add(self, documents: list[Document]) -> None:
        whole = [(document, pieces) for document in documents if (pieces := self._pieces(document)) is not None]
        encoded = iter(self.tokenizer.encode([one for _, pieces in whole for one in pieces if isinstance(one, str)]))
        for document, pieces in whole:
            counts = self.counts[_split(document)]
            pictures: list[tuple[int, int, EncodedPicture]] = []
            ids: Any
            if document.parts is None:
                ids = next(encoded)
            else:
                ids, pictures = spell(pieces, encoded, self.images)
            kept = self._limit(ids, counts)
            if kept is not None:
                counts["documents"] += 1
                counts["bytes"] += len(document.text.encode())
                counts["pictures"] += len(pictures)
                self._append(document, kept, pictures)
        self.index.flush()

    def _pieces(self, document: Document) -> list[str | EncodedPicture] | None:
        """Return the texts and pictures of a document, or None for one that is dropped, which is counted."""
        pieces: list[str | EncodedPicture] = [document.text]
        dropped = document.dropped
        if dropped is None and document.parts is not None:
            try:
                pieces = self.images.pieces(document.parts, self.packed_seq_len)
            except BadMediaError as error:
                if self.images.config.on_bad is BadMedia.fail:
                    key, advice = f"data.sources.{self.source.name}", ["data.images.on_bad=drop"]
                    raise ConfigError(key, document.name, str(error), advice) from None
                dropped = BAD_MEDIA
        if self.pairs_only and dropped is None:
            dropped = why_no_pair(pieces)
        if dropped is not None:
            self.counts[_split(document)][f"dropped_{dropped}"] += 1
            return None
        return pieces

    @property
    def images(self) -> ImageSpelling:
        assert self._images is not None  # sources refuse pictures without data.images
        return self._images

    def close(self) -> dict[str, Any]:
        """Return the source's entry in the manifest. Raises `ConfigError` if nothing is left to train on."""
        if self.packer is not None:
            self._write_packed(self.packer.close())
        for split in (TRAIN, HELD_OUT) if self.pairs_only else (TRAIN,) if self.packer is not None else ():
            # the last sequence needs one more token, as its last label; a label that is BOS is ignored
            if self.streams[split].tokens or split == TRAIN:
                self.streams[split].add([self.tokenizer.bos_id])
        self.index.close()
        if not self.counts[TRAIN]["documents"]:
            raise ConfigError(f"data.sources.{self.source.name}", None, self._why_empty())
        found: dict[str, Any] = {}
        for split, stream in self.streams.items():
            shards = [asdict(shard) for shard in stream.close()]
            counts = {key: count for key, count in self.counts[split].items() if count}
            found[split] = {"shards": shards, "counts": {"tokens": stream.tokens, **counts}}
            if (stored := self.pictures[split].close()) is not None:
                found[split]["pictures"] = stored
        return found

    def _why_empty(self) -> str:
        reason = "has no text to train on"
        held_out, dropped = self.counts[HELD_OUT]["documents"], self.counts[TRAIN] + self.counts[HELD_OUT]
        by_filter = {k: n for k, n in self.counts[TRAIN].items() if k.startswith("dropped_by_filter")}
        if by_filter:
            return f"{reason}: data.filter drops all of it ({_listed(by_filter)})"
        if held_out:
            return f"{reason}: its {held_out} documents are held out; lower data.held_out or add documents"
        return f"{reason} ({_listed(dropped)})" if dropped else reason

    def _append(self, document: Document, ids: Sequence[int], pictures: list[tuple[int, int, EncodedPicture]]) -> None:
        """Append a document, given without BOS and EOS, to its stream, or pass it to the packer."""
        counts, writer = self.counts[_split(document)], self.pictures[_split(document)]
        placed = [PlacedPicture(start, writer.add(picture, tokens)) for start, tokens, picture in pictures]
        if self.packer is not None and not document.held_out:
            is_cut, packed = self.packer.add(ids, document.name, placed)
            counts["cut"] += is_cut
            return self._write_packed(packed)
        whole_document = [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]
        length = len(whole_document)
        if self.pairs_only and self.packed_seq_len is not None:
            space = self.packed_seq_len - length
            counts["padding"] += space
            whole_document += [self.tokenizer.eos_id] * space
        stream = self.streams[_split(document)]
        # pad up to the next multiple of `align`, unless the document fits before it
        left = -stream.tokens % self.config.align if self.config.align is not None else 0
        padding = left if len(whole_document) > left else 0
        begin = stream.tokens + padding
        if (seq_len := self.config.pack_seq_len) is not None:
            counts["cut"] += begin // seq_len != (begin + length - 1) // seq_len
        counts["padding"] += padding
        if document.name is not None and not document.held_out:
            self.index.add(document.name, begin, length)
        for one in placed:
            writer.place(begin + 1 + one.start, one.picture)
        stream.add([self.tokenizer.eos_id] * padding + whole_document)

    def _write_packed(self, sequences: Sequence[PackedSequence]) -> None:
        stream = self.streams[TRAIN]
        for sequence in sequences:
            for piece in sequence.pieces:
                if piece.name is not None:
                    self.index.add(piece.name, stream.tokens, len(piece.ids))
                for one in piece.pictures:
                    self.pictures[TRAIN].place(stream.tokens + one.start, one.picture)
                stream.add(piece.ids)
            stream.add([self.tokenizer.eos_id] * sequence.space)
            self.counts[TRAIN]["padding"] += sequence.space

    def _limit(self, ids: Any, counts: Counter[str]) -> Any:
        """Return the ids to keep of a document, or None to drop the document."""
        limit, policy = self.config.limit_tokens, self.config.long_documents
        if self.pairs_only and self.packed_seq_len is not None and len(ids) + 2 > self.packed_seq_len:
            counts["dropped_longer_than_a_sequence"] += 1
            return None
        if limit is None or len(ids) <= limit or policy is LongDocuments.split:
            return ids
        if policy is LongDocuments.refuse:
            reason = f"data.sources.{self.source.name} has a document of {len(ids)} tokens"
            advice = [f"data.long_documents={p.name}" for p in LongDocuments if p is not policy]
            raise ConfigError("data.limit_tokens", limit, f"{reason}; raise the limit", advice)
        counts[f"long_{policy.name}"] += 1
        return ids[:limit] if policy is LongDocuments.truncate else None


class DocumentIndex:
    """Write a parquet file with the position of each named training document in the stream of its source. A source
    without such documents gets no file. A row has the name, start (of BOS) and number of tokens of a document, or of a
    piece if packing cut it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[tuple[str, int, int]] = []
        self._writer: Any = None

    def add(self, name: str, start: int, tokens: int) -> None:
        self._rows.append((name, start, tokens))

    def flush(self) -> None:
        if self._rows:
            import pyarrow.parquet

            names, starts, tokens = zip(*self._rows, strict=True)
            table = pyarrow.table({"name": names, "start": starts, "tokens": tokens})
            self._writer = self._writer or pyarrow.parquet.ParquetWriter(self.path, table.schema)
            self._writer.write_table(table)
            self._rows = []

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()


def _split(document: Document) -> str:
    return HELD_OUT if document.held_out else TRAIN


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())
