"""What a run is trained on: sources, tokenizer, and the rules that documents go through."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from core.errors import ConfigError, check_numbers
from core.import_path import check_options
from data.filter.config import FilterRules


class SourceKind(Enum):
    builtin = "builtin"
    """The Python standard library's own source on this machine: real text, no download."""
    files = "files"
    """parquet, jsonl (also .gz) or text files, told apart by their suffix."""
    huggingface = "huggingface"
    """A data set of the Hugging Face hub or in its form on disk, streamed."""


class Section(Enum):
    """The four domains of the built-in corpus."""

    code = "code"
    tests = "tests"
    docstrings = "docstrings"
    pydoc = "pydoc"


class Undecodable(Enum):
    """What to do with bytes that are no UTF-8: stop, leave the document out, or put U+FFFD in their place."""

    fail = "fail"
    drop = "drop"
    replace = "replace"


class LongDocuments(Enum):
    """What to do with a document of more than `limit_tokens`: keep it all (rows cut it where they end), cut it off
    there, leave it out, or stop.
    """

    split = "split"
    truncate = "truncate"
    drop = "drop"
    refuse = "refuse"


class Packing(Enum):
    """How documents become rows. `greedy`: one after the other; rows cut them where they end. `best_fit`: each is put
    whole into the row that it fills best, what is longer than a row is cut into whole rows first (Ding et al. 2024).
    """

    greedy = "greedy"
    best_fit = "best_fit"


class TokenizerKind(Enum):
    bpe = "bpe"
    """Trained on the corpus: byte-level pairs (Sennrich et al. 2016)."""
    tokenizer_json = "tokenizer_json"
    tiktoken = "tiktoken"


@dataclass(frozen=True)
class SourceConfig:
    """One source is one domain; its name is its key in `data.sources`.

    `weight`: its share of the training tokens (less padding), relative to the others'. `max_epochs`: after so many
    times it is left out of the run and the others take its share; null: no limit. `max_bytes` ends the source with the
    document that reaches so much training text. `held_out_path`: held-out documents come from there instead of being
    split off. Both paths may be URLs of any filesystem that fsspec has a driver for.
    """

    kind: SourceKind | str = SourceKind.files
    """A name, or the import path of a class: see `data.sources.ImportedSource`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of an imported class."""
    section: Section | None = None
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"
    weight: float = 1.0
    max_epochs: float | None = None
    max_bytes: int | None = None
    held_out_path: str | None = None

    def __post_init__(self) -> None:
        if self.kind is SourceKind.builtin and self.section is None:
            raise ConfigError("section", None, "the built-in corpus needs one", [s.name for s in Section])
        check_options(self.kind, self.options)
        if self.kind in (SourceKind.files, SourceKind.huggingface) and not self.path:
            assert isinstance(self.kind, SourceKind)
            raise ConfigError("path", self.path, f"a source of kind {self.kind.name} needs a path")
        if self.kind is not SourceKind.files and self.held_out_path:
            raise ConfigError("held_out_path", self.held_out_path, "works with kind=files only")
        if self.weight <= 0:
            raise ConfigError("weight", self.weight, "must be positive; leave the source out instead")
        if not math.isfinite(self.weight):
            raise ConfigError("weight", self.weight, "must be a finite number")
        check_numbers(self, positive=("max_epochs",))
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError("max_bytes", self.max_bytes, "must be positive, or null for everything")


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
"""How Llama 4's tokenizer cuts text before merging pairs (the o200k form)."""


@dataclass(frozen=True)
class TokenizerConfig:
    """`vocab_size` and `train_bytes` (how much text to train on, in characters: more bytes where it is not
    ASCII) are for bpe, `path` for the others; `pattern` and `special_tokens` (how many ids are kept for them after the
    ranks) for tiktoken. `bos` and `eos` name the tokens that open and close a document.
    """

    kind: TokenizerKind = TokenizerKind.bpe
    path: str | None = None
    vocab_size: int = 1024
    train_bytes: int = 2_000_000
    pattern: str = O200K_PATTERN
    special_tokens: int = 2048
    bos: str = "<|begin_of_text|>"
    eos: str = "<|end_of_text|>"

    def __post_init__(self) -> None:
        if self.kind is TokenizerKind.bpe and self.vocab_size < 258:
            raise ConfigError("vocab_size", self.vocab_size, "must hold 256 bytes and 2 special tokens", [512, 1024])
        if self.kind is not TokenizerKind.bpe and not self.path:
            raise ConfigError("path", self.path, f"a tokenizer of kind {self.kind.name} needs its file")
        if self.train_bytes < 1:
            raise ConfigError("train_bytes", self.train_bytes, "must be positive")
        if self.bos == self.eos:
            raise ConfigError("eos", self.eos, "must differ from bos, which is how documents are told apart")
        if self.special_tokens < 2:
            raise ConfigError("special_tokens", self.special_tokens, "must leave room for bos and eos", [2, 2048])


@dataclass(frozen=True)
class DataConfig:
    """`held_out`: share of the documents kept from training. `tokens`: a directory that `leviathan tokenize` made; the
    sources are then not read. `verify`: hash the token shards before training. `align`: pad between documents, so that
    none crosses a multiple of so many tokens but those that lie whole chunks after its start (the model's chunk: its
    chunked layers then need nothing from other ranks of cp); null: no padding. `packing`: of training documents;
    `pack_seq_len`: the tokens of the rows that `best_fit` makes, for which `greedy` counts how many documents are cut.
    `prefetch`: batches made ahead of the step that takes them; 0: none. `filter`: what training documents must
    pass (each source is a domain); held-out ones are left as they are.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tokens: str | None = None
    held_out: float = 0.05
    undecodable: Undecodable = Undecodable.fail
    long_documents: LongDocuments = LongDocuments.split
    limit_tokens: int | None = None
    align: int | None = None
    packing: Packing = Packing.greedy
    pack_seq_len: int | None = None
    prefetch: int = 2
    filter: FilterRules | None = None
    verify: bool = True
    cache: str = "~/.cache/leviathan"

    def __post_init__(self) -> None:
        if not self.sources and not self.tokens:
            raise ConfigError("sources", None, "name at least one source, or a directory of tokens (data.tokens)")
        if self.filter is not None and self.tokens is not None:
            raise ConfigError("filter", None, "tokens are made already: filter the documents that they are made of")
        for name in self.sources:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(
                    f"sources.{name}", None, "names of sources are made of letters, digits, '_', '-', '.'"
                )
        if not 0 <= self.held_out < 1:
            raise ConfigError("held_out", self.held_out, "must lie in [0, 1)")
        if self.long_documents is not LongDocuments.split and self.limit_tokens is None:
            reason = f"long_documents={self.long_documents.name} needs a limit"
            raise ConfigError("limit_tokens", None, reason)
        check_numbers(self, positive=("limit_tokens", "align"), not_negative=("prefetch",))
        if self.pack_seq_len is not None and self.pack_seq_len < 2:
            raise ConfigError("pack_seq_len", self.pack_seq_len, "must hold the begin of a document and a token", [2])
        if self.packing is Packing.best_fit and self.pack_seq_len is None:
            raise ConfigError("pack_seq_len", None, "packing=best_fit makes rows of so many tokens: name them")
        if self.packing is Packing.best_fit and self.align is not None:
            raise ConfigError("align", self.align, "works with packing=greedy: best_fit begins each row anew", ["null"])

    def import_paths(self) -> dict[str, str]:
        """Return the import paths of sources, scorers and verifiers by key, relative to `data`."""
        found: dict[str, object] = {f"sources.{name}.kind": source.kind for name, source in self.sources.items()}
        if self.filter is not None:
            found |= self.filter.scorer.import_paths("filter.scorer")
        return {key: path for key, path in found.items() if isinstance(path, str)}
