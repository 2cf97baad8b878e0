"""Configuration of a run's data: sources, tokenizer, packing and filter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from core.errors import ConfigError, check_local, check_numbers
from core.import_path import check_options
from data.filter.config import FilterRules, OnError
from data.images.config import ImagesConfig
from data.images.parts import PartsConfig


class SourceKind(Enum):
    builtin = "builtin"
    """The source code of this machine's Python standard library: real text without a download."""
    files = "files"
    """jsonl (also .gz, .zst), parquet or text files, by suffix."""
    huggingface = "huggingface"
    """A data set of the Hugging Face hub, or a folder of the `datasets` library, streamed: text, and with `data.images`
    pictures too."""
    documents = "documents"
    """jsonl, parquet or WebDataset tars whose records have text, pictures and videos: see `data.images.readers`."""


class Section(Enum):
    """The four domains of the built-in corpus."""

    code = "code"
    tests = "tests"
    docstrings = "docstrings"
    pydoc = "pydoc"


class Undecodable(Enum):
    """Policy for bytes that are not UTF-8: fail, drop the document, or replace the bytes by U+FFFD."""

    fail = "fail"
    drop = "drop"
    replace = "replace"


class LongDocuments(Enum):
    """Policy for a document longer than `limit_tokens`: split it over sequences, truncate it, drop it, or fail."""

    split = "split"
    truncate = "truncate"
    drop = "drop"
    refuse = "refuse"


class Packing(Enum):
    """How documents become sequences. `greedy`: they are concatenated, and cut where a sequence ends. `best_fit`: each
    is put whole into the sequence that it fills best; only those longer than a sequence are cut (Ding et al. 2024).
    `pairs`: each image-caption pair is a sequence of its own, padded with EOS. Documents that are no such pair (one
    picture of one tile, and text) or longer than a sequence are dropped and counted.
    """

    greedy = "greedy"
    best_fit = "best_fit"
    pairs = "pairs"

    @property
    def has_seq_len(self) -> bool:
        """Whether sequences have the one length `pack_seq_len`."""
        return self is not Packing.greedy


class TokenizerKind(Enum):
    bpe = "bpe"
    """Byte-level byte-pair encoding (Sennrich et al. 2016), trained on the corpus."""
    tokenizer_json = "tokenizer_json"
    """A `tokenizer.json` of the `tokenizers` library, as on the Hugging Face hub."""
    tiktoken = "tiktoken"
    """A file of base64 tokens and ranks, as in Llama's `tokenizer.model`."""


@dataclass(frozen=True)
class SourceConfig:
    """One source is one domain; its name is its key in `data.sources`. Paths may be URLs of any fsspec filesystem."""

    kind: SourceKind | str = SourceKind.files
    """A name, or the import path of a class: see `data.sources.ImportedSource`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of an imported class."""
    section: Section | None = None
    """For `builtin`: the section of the standard library."""
    path: str | None = field(default=None, metadata={"path": True})
    """A file, folder or glob pattern. For `huggingface`: the name of a data set, or a folder."""
    subset: str | None = None
    """For `huggingface`: the data set's configuration, such as a language; null: its default."""
    split: str = "train"
    """For `huggingface`: the split to train on."""
    text_key: str = "text"
    """Column of a parquet file or data set, or key of a jsonl record, that holds the text."""
    parts: PartsConfig = field(default_factory=PartsConfig)
    """For `documents`, and `huggingface` with pictures: the columns of text, pictures and videos."""
    weight: float = 1.0
    """Weight of the source in the training tokens (without padding), relative to the other sources."""
    max_epochs: float | None = None
    """Number of epochs after which the source is dropped and the other sources replace it; null: no limit."""
    max_bytes: int | None = None
    """End the source with the document at which its training text reaches this many bytes; null: read all."""
    held_out_path: str | None = field(default=None, metadata={"path": True})
    """Read held-out documents from here instead of splitting them off."""

    def __post_init__(self) -> None:
        if self.kind is SourceKind.builtin and self.section is None:
            raise ConfigError("section", None, "must be set for the built-in corpus", [s.name for s in Section])
        check_options(self.kind, self.options)
        if isinstance(self.kind, SourceKind) and self.kind is not SourceKind.builtin and not self.path:
            raise ConfigError("path", self.path, f"a source of kind {self.kind.name} needs a path")
        if self.kind not in (SourceKind.files, SourceKind.documents) and self.held_out_path:
            raise ConfigError("held_out_path", self.held_out_path, "requires kind=files or kind=documents")
        if self.kind is SourceKind.huggingface and self.parts.text_key != PartsConfig.text_key:
            raise ConfigError("parts.text_key", self.parts.text_key, "names the text of kind=documents; use text_key")
        if not 0 < self.weight < math.inf:
            raise ConfigError("weight", self.weight, "must be positive and finite; to drop the source, omit it")
        check_numbers(self, positive=("max_epochs", "max_bytes"))


O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Pattern that splits text into pre-tokens in Llama 4's tokenizer (o200k)."""


MOST_TOKENS = 10_000_000
"""Largest vocabulary to train. The largest published ones have 262,144 tokens."""


@dataclass(frozen=True)
class TokenizerConfig:
    kind: TokenizerKind = TokenizerKind.bpe
    """How text becomes tokens."""
    path: str | None = field(default=None, metadata={"path": True})
    """The tokenizer's file. Not used by `bpe`."""
    vocab_size: int = 1024
    """For `bpe`: size of the vocabulary. The files of other kinds determine theirs."""
    train_bytes: int = 2_000_000
    """For `bpe`: number of characters of text to train on."""
    pattern: str = O200K_PATTERN
    """For `tiktoken`: the regular expression that splits text before merging."""
    special_tokens: int = 2048
    """For `tiktoken`: number of ids for special tokens, which follow the ids of all other tokens."""
    bos: str = "<|begin_of_text|>"
    """First token of each document."""
    eos: str = "<|end_of_text|>"
    """Last token of each document."""

    def __post_init__(self) -> None:
        if self.kind is TokenizerKind.bpe and self.vocab_size < 258:
            raise ConfigError("vocab_size", self.vocab_size, "must hold 256 bytes and 2 special tokens", [512, 1024])
        if self.vocab_size > MOST_TOKENS:
            raise ConfigError("vocab_size", self.vocab_size, f"must be at most {MOST_TOKENS:,}")
        if self.kind is not TokenizerKind.bpe and not self.path:
            raise ConfigError("path", self.path, f"a tokenizer of kind {self.kind.name} needs its file")
        check_numbers(self, positive=("train_bytes",))
        if self.bos == self.eos:
            raise ConfigError("eos", self.eos, "must differ from bos, which marks where a document begins")
        if self.special_tokens < 2:
            raise ConfigError("special_tokens", self.special_tokens, "must hold bos and eos", [2, 2048])


@dataclass(frozen=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """The sources by name. The name appears in metrics and in `training.weights`."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokens: str | None = field(default=None, metadata={"path": True})
    """A directory that `leviathan tokenize` made. If it is set, the sources are not read."""
    held_out: float = 0.05
    """Fraction of the documents to hold out from training."""
    undecodable: Undecodable = Undecodable.fail
    long_documents: LongDocuments = LongDocuments.split
    limit_tokens: int | None = None
    """Length beyond which `long_documents` applies; null: no limit."""
    align: int | None = None
    """Pad so that a document crosses a multiple of this number of tokens only if it starts at one. With the model's
    chunk size, chunked attention needs no keys from other cp ranks. null: no padding."""
    packing: Packing = Packing.greedy
    """Held-out documents are packed as with `greedy`, unless this is `pairs`."""
    pack_seq_len: int | None = None
    """Sequence length of `best_fit` and `pairs`. `greedy` only counts the documents that this length would cut."""
    prefetch: int = 2
    """Number of batches to prepare in advance; 0: none."""
    images: ImagesConfig | None = None
    """Pictures and videos; null: all sources are text."""
    filter: FilterRules | None = None
    """Filter of the training documents; each source is a domain. Held-out documents are not filtered."""
    verify: bool = True
    """Check the hashes of the token shards before training."""
    cache: str = "~/.cache/leviathan"
    """Folder for trained tokenizers, token shards, digests, scores and certificates, shared by runs."""

    def __post_init__(self) -> None:
        check_local("cache", self.cache)
        if not self.sources and not self.tokens:
            raise ConfigError("sources", None, "name at least one source, or a directory of tokens (data.tokens)")
        if self.filter is not None and self.tokens is not None:
            reason = "cannot be applied to data.tokens: set it when you run `leviathan tokenize`"
            raise ConfigError("filter", None, reason)
        for name, source in self.sources.items():
            if source.kind is SourceKind.documents and self.images is None:
                raise ConfigError("images", None, f"sources.{name} has pictures", ["+data.images={}"])
            if not re.fullmatch(r"[\w.-]+", name):
                reason = "a name of a source has letters, digits, '_', '-' and '.' only"
                raise ConfigError(f"sources.{name}", None, reason)
        if not 0 <= self.held_out < 1:
            raise ConfigError("held_out", self.held_out, "must lie in [0, 1)")
        if self.long_documents is not LongDocuments.split and self.limit_tokens is None:
            raise ConfigError("limit_tokens", None, f"long_documents={self.long_documents.name} needs a limit")
        check_numbers(self, positive=("limit_tokens", "align"), not_negative=("prefetch",))
        if self.pack_seq_len is not None and self.pack_seq_len < 2:
            raise ConfigError("pack_seq_len", self.pack_seq_len, "must hold BOS and a token", [2])
        if self.packing.has_seq_len and self.pack_seq_len is None:
            raise ConfigError("pack_seq_len", None, f"packing={self.packing.name} needs the length of its sequences")
        if self.packing is Packing.pairs and self.images is None and self.tokens is None:
            raise ConfigError("images", None, "packing=pairs needs pictures with captions", ["+data.images={}"])
        if self.images is not None and self.filter is not None and self.filter.on_error is OnError.keep:
            reason = "would keep documents whose pictures cannot be used"
            raise ConfigError("filter.on_error", self.filter.on_error, reason, [OnError.drop, OnError.fail])
        if self.images is not None and self.long_documents is LongDocuments.truncate:
            reason = "cannot cut documents with pictures"
            raise ConfigError("long_documents", self.long_documents, reason, ["split", "drop", "refuse"])
        if self.packing.has_seq_len and self.align is not None:
            reason = f"needs packing=greedy: {self.packing.name} starts each sequence with a document"
            raise ConfigError("align", self.align, reason, ["null"])

    def import_paths(self) -> dict[str, str]:
        """Return the import paths of sources, scorers and verifiers by key, relative to `data`."""
        found: dict[str, object] = {f"sources.{name}.kind": source.kind for name, source in self.sources.items()}
        if self.filter is not None:
            found |= self.filter.scorer.import_paths("filter.scorer")
        return {key: path for key, path in found.items() if isinstance(path, str)}
