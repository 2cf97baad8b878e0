"""Small sources and the corpora made of them."""

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
    """A folder of text files of made-up words, each file another text."""
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
    """A configuration as the command would build it; keys of the tokenizer go under `tokenizer`."""
    tokenizer = {"vocab_size": 300, **settings.pop("tokenizer", {})}
    values = {"sources": sources, "cache": str(cache), "held_out": 0.2, "tokenizer": tokenizer, **settings}
    return build(DataConfig, values, "data")


def silent(line: str) -> None:
    """A report nobody reads."""


def counts_of(corpus: Corpus, source: str) -> dict[str, int]:
    """The manifest's counts of a source's training documents."""
    return corpus.manifest["sources"][source][TRAIN]["counts"]


def documents_of(corpus: Corpus, source: str, split: str) -> list[str]:
    """Documents of a stream, cut at BOS; the last token of each is EOS."""
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
    """No test asks the hub; `datasets` keeps its files in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """`make_corpus(sources, **settings)`: prepared in a cache of the test's own."""
    return lambda sources, **settings: prepare(make_config(tmp_path / "cache", sources, **settings), silent)


@pytest.fixture
def mixed(make_corpus: Callable[..., Corpus], tmp_path: Path) -> Callable[..., Corpus]:
    """`mixed(**settings)`: a source `a` with documents of 3 to 40 words."""
    for words in (3, 5, 8, 40):
        write_texts(tmp_path / "mixed" / str(words), 60, words, seed=words)
    return lambda **settings: make_corpus({"a": {"path": str(tmp_path / "mixed")}}, **settings)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two sources, `long` with about three times the text of `short`. Tests must not change its files."""
    root = tmp_path_factory.mktemp("shared")
    sources = {
        "long": {"path": str(write_texts(root / "long", 60, seed=1)), "weight": 3.0},
        "short": {"path": str(write_texts(root / "short", 20, seed=2)), "weight": 1.0},
    }
    return prepare(make_config(root / "cache", sources), silent)
