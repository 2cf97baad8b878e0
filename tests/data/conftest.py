"""Small sources and the corpora made of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.config import build
from data.config import DataConfig
from data.corpus import Corpus, prepare


def write_texts(folder: Path, documents: int, words: int = 300, seed: int = 0) -> Path:
    """A folder of text files of made-up words, each file another text."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    for number in range(documents):
        text = " ".join("".join(chance.choices("etaoinshr", k=chance.randint(2, 7))) for _ in range(words))
        (folder / f"{number:03d}.txt").write_text(f"Text {seed}-{number}. {text}\n")
    return folder


def make_config(cache: Path, sources: dict[str, Any], **settings: Any) -> DataConfig:
    """A configuration as the command would build it; keys of the tokenizer go under `tokenizer`."""
    tokenizer = {"vocab_size": 300, **settings.pop("tokenizer", {})}
    values = {"sources": sources, "cache": str(cache), "held_out": 0.2, "tokenizer": tokenizer, **settings}
    return build(DataConfig, values, "data")


def silent(line: str) -> None:
    """A report nobody reads."""


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """`make_corpus(sources, **settings)`: prepared in a cache of the test's own."""
    return lambda sources, **settings: prepare(make_config(tmp_path / "cache", sources, **settings), silent)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two sources, `long` with about three times the text of `short`. Tests must not change its files."""
    root = tmp_path_factory.mktemp("shared")
    sources = {
        "long": {"path": str(write_texts(root / "long", 60, seed=1)), "weight": 3.0},
        "short": {"path": str(write_texts(root / "short", 20, seed=2)), "weight": 1.0},
    }
    return prepare(make_config(root / "cache", sources), silent)
