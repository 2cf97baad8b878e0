"""The verb `tokenize`: tokenize a corpus before a run, into a directory of shards that several runs can use."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.errors import ConfigError
from core.files import local_path, new_directory
from data.config import DataConfig

if TYPE_CHECKING:
    from data.corpus import Corpus


@dataclass(frozen=True)
class TokenizeConfig:
    """Tokenize a corpus into shards."""

    data: DataConfig = field(default_factory=DataConfig)
    out: str | None = None
    """Directory to create, which a run takes as `data.tokens`; null: write to the cache only."""


def run(config: TokenizeConfig) -> int:
    """Tokenize and print a table of the result."""
    from data.corpus import prepare
    from train.eval.contamination import MODELS

    out = local_path("out", config.out) if config.out else None
    if out is not None and os.path.lexists(out):
        raise ConfigError("out", config.out, "exists already; choose another directory or remove it")
    corpus = prepare(config.data, print, MODELS)
    corpus.verify()
    if out is not None:
        with new_directory(out, exclusive=True) as scratch:
            shutil.copytree(corpus.directory, scratch, dirs_exist_ok=True)
    print(table(corpus))
    if len({source.weight for source in config.data.sources.values()}) > 1:
        print("tokens have no weights: give them to the run (training.weights)")
    print(f"tokens: {out or corpus.directory}")
    return 0


def table(corpus: Corpus) -> str:
    """Return documents, bytes and tokens of each source and split as a table."""
    lines = [f"{'source':<16} {'split':<9} {'documents':>12} {'bytes':>16} {'tokens':>16} {'bytes/token':>12}"]
    for name, splits in corpus.manifest["sources"].items():
        for split, part in splits.items():
            counts = part["counts"]
            size, tokens = counts.get("bytes", 0), counts["tokens"]
            ratio = size / tokens if tokens else 0.0
            lines.append(
                f"{name:<16} {split:<9} {counts.get('documents', 0):>12,} {size:>16,} {tokens:>16,} {ratio:>12.2f}"
            )
            if padding := counts.get("padding", 0):
                lines.append(f"{'':<26} padding: {padding:,} ({padding / tokens:.1%})")
            if cut := counts.get("cut", 0):
                lines.append(f"{'':<26} cut: {cut:,} documents ({cut / counts['documents']:.1%})")
            lines += [
                f"{'':<26} {key}: {value:,}" for key, value in counts.items() if key.startswith(("dropped_", "long_"))
            ]
    return "\n".join(lines)
