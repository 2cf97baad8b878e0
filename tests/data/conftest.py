"""Build small sources, and corpora from them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from core.config import build
from data.config import DataConfig
from data.corpus import TRAIN, Corpus, prepare

TEXTS = [f"Text number {number}, long enough to differ from others: {number * 7919}." for number in range(60)]


def write_texts(folder: Path, documents: int, words: int = 300, seed: int = 0) -> Path:
    """Write a folder of text files of made-up words; every file is different."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    for number in range(documents):
        text = " ".join("".join(chance.choices("etaoinshr", k=chance.randint(2, 7))) for _ in range(words))
        (folder / f"{number:03d}.txt").write_text(f"Text {seed}-{number}. {text}\n")
    return folder


def write_parquet(path: Path, column: str = "text", values: list[Any] | None = None) -> Path:
    table = pyarrow.table({column: values or TEXTS, "id": list(range(len(values or TEXTS)))})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    return path


def write_jsonl(path: Path, records: list[Any] | None = None) -> Path:
    content = "".join(json.dumps(r) + "\n" for r in records or [{"text": text} for text in TEXTS]).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pyarrow.Codec("zstd").compress(content, asbytes=True)
    path.write_bytes(content)
    return path


def make_config(cache: Path, sources: dict[str, Any], **settings: Any) -> DataConfig:
    """Build a configuration as the command does. Keys of the tokenizer go under `tokenizer`."""
    tokenizer = {"vocab_size": 300, **settings.pop("tokenizer", {})}
    values = {"sources": sources, "cache": str(cache), "held_out": 0.2, "tokenizer": tokenizer, **settings}
    return build(DataConfig, values, "data")


def silent(line: str) -> None:
    """Discard a log line."""


def counts_of(corpus: Corpus, source: str) -> dict[str, int]:
    """Return the manifest's counts for the training documents of a source."""
    return corpus.manifest["sources"][source][TRAIN]["counts"]


def documents_of(corpus: Corpus, source: str, split: str) -> list[str]:
    """Return the documents of a stream, split at BOS. Check that each ends with EOS."""
    stream, tokenizer = corpus.stream(source, split), corpus.tokenizer
    documents: list[list[int]] = []
    for token in stream.window(0, len(stream)).tolist():
        if token == tokenizer.bos_id:
            documents.append([])
        documents[-1].append(token)
    assert all(document[-1] == tokenizer.eos_id for document in documents)
    return [tokenizer.decode(document) for document in documents]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep tests offline, with the cache of the Hugging Face libraries in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """Return `make_corpus(sources, **settings)`, which prepares a corpus in the test's own cache."""
    return lambda sources, **settings: prepare(make_config(tmp_path / "cache", sources, **settings), silent)


@pytest.fixture
def mixed(make_corpus: Callable[..., Corpus], tmp_path: Path) -> Callable[..., Corpus]:
    """Return `mixed(**settings)`, which prepares a corpus of one source, `a`, with documents of 3 to 40 words."""
    for words in (3, 5, 8, 40):
        write_texts(tmp_path / "mixed" / str(words), 60, words, seed=words)
    return lambda **settings: make_corpus({"a": {"path": str(tmp_path / "mixed")}}, **settings)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Prepare a corpus of two sources; `long` has three times the text of `short`. Tests must not change it."""
    root = tmp_path_factory.mktemp("shared")
    sources = {
        "long": {"path": str(write_texts(root / "long", 60, seed=1)), "weight": 3.0},
        "short": {"path": str(write_texts(root / "short", 20, seed=2)), "weight": 1.0},
    }
    return prepare(make_config(root / "cache", sources), silent)
