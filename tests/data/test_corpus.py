"""Prepare a directory of tokens from sources: it is made once, found again, and rejected when damaged."""

from __future__ import annotations

import base64
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from core.errors import ConfigError, DataError
from data.corpus import HELD_OUT, TRAIN, Corpus, _sample, open_corpus, prepare
from data.sources import make_source
from data.tokens import TokenWriter
from tests.data.conftest import counts_of, documents_of, make_config, silent, write_texts


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    folder = write_texts(tmp_path / "texts", 20)
    for path in folder.iterdir():
        path.write_text(path.read_text() + "Grüße, 世界")  # more bytes than characters
    return {"mine": {"path": str(folder)}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Prepare a corpus for tests to copy and damage."""
    root = tmp_path_factory.mktemp("damaged")
    return prepare(make_config(root, {"mine": {"path": str(write_texts(root / "texts", 9))}}), silent)


@pytest.fixture
def copy(shared: Corpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared.directory, tmp_path / "tokens"))


@pytest.mark.parametrize("shard_tokens", [100, 1 << 20])
def test_every_document_is_in_one_stream(make_corpus, sources, monkeypatch, shard_tokens):
    monkeypatch.setattr(TokenWriter.__init__, "__defaults__", (shard_tokens,))
    corpus = make_corpus(sources)
    assert (len(corpus.manifest["sources"]["mine"][TRAIN]["shards"]) > 20) == (shard_tokens == 100)
    train, held_out = (documents_of(corpus, "mine", split) for split in (TRAIN, HELD_OUT))
    written = [path.read_text() for path in Path(sources["mine"]["path"]).iterdir()]
    assert sorted(train + held_out) == sorted(written) and 0 < len(held_out) < 10
    counts, stream = counts_of(corpus, "mine"), corpus.stream("mine", TRAIN)
    assert counts["documents"] == len(train) and counts["tokens"] == len(stream)
    assert counts["bytes"] == sum(len(text.encode()) for text in train)
    sizes = corpus.tokenizer.token_bytes()
    assert counts["bytes"] == sizes[stream.window(0, len(stream))].sum(), "the bytes of tokens are those of the text"


def test_the_cache_is_found_again(tmp_path, sources):
    cache, lines = tmp_path / "cache", list[str]()
    first = prepare(make_config(cache, sources), lines.append)
    assert any("training a tokenizer" in line for line in lines) and any("tokenising mine" in line for line in lines)
    lines.clear()
    weighted = {"mine": {**sources["mine"], "weight": 5.0}}
    assert prepare(make_config(cache, weighted), lines.append).directory == first.directory
    assert prepare(make_config(cache, sources, verify=False), lines.append).directory == first.directory
    assert not lines
    elsewhere = prepare(make_config(tmp_path / "other", sources), silent)
    assert elsewhere.fingerprint == first.fingerprint and elsewhere.directory != first.directory


def test_whatever_changes_the_tokens_makes_another_corpus(tmp_path, make_corpus, sources):
    truncated = {"limit_tokens": 500, "long_documents": "truncate"}
    settings: list[dict[str, Any]] = [{}, {"held_out": 0.3}, {"tokenizer": {"vocab_size": 310}}, truncated]
    found = [make_corpus(sources, **keys) for keys in settings]
    (Path(sources["mine"]["path"]) / "000.txt").write_text("another text altogether")
    found.append(make_corpus(sources))
    ranks = tmp_path / "ranks"
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    for vocabulary in (lines, [*lines, f"{base64.b64encode(b'et').decode()} 256\n"]):
        ranks.write_text("".join(vocabulary))
        found.append(make_corpus(sources, tokenizer={"kind": "tiktoken", "path": str(ranks)}))
    assert len({corpus.directory for corpus in found}) == len({corpus.fingerprint for corpus in found}) == 7


def test_the_tokenizer_is_trained_on_training_text_alone(tmp_path, sources):
    config = make_config(tmp_path / "cache", sources)
    source = make_source("mine", config.sources["mine"], config)
    sides = {side: [d.text for d in source.documents() if d.held_out is side] for side in (True, False)}
    assert list(_sample([source], 1 << 30)) == sides[False] and sides[True]


def test_tokens_are_used_without_their_sources(tmp_path, shared, copy, sources):
    used = prepare(make_config(tmp_path / "cache", {"mine": {"path": "/nowhere"}}, tokens=str(copy)), silent)
    assert used.fingerprint == shared.fingerprint and used.tokenizer.fingerprint == shared.tokenizer.fingerprint
    with pytest.raises(ConfigError, match=r"data.tokens=.*: is not a directory of tokens .*leviathan tokenize"):
        prepare(make_config(tmp_path / "cache", sources, tokens=str(tmp_path)), silent)


def long_documents(make_corpus: Callable[..., Corpus], tmp_path: Path, policy: str) -> Corpus:
    folder = write_texts(tmp_path / "short", 8, words=3)
    (folder / "long.txt").write_text("a b c d " * 100)
    held_out = write_texts(tmp_path / "held_out", 2, words=3)
    source = {"path": str(folder), "held_out_path": str(held_out)}
    return make_corpus({"mine": source}, limit_tokens=90, long_documents=policy)


@pytest.mark.parametrize("policy, documents", [("split", 9), ("truncate", 9), ("drop", 8)])
def test_long_documents(make_corpus, tmp_path, policy, documents):
    corpus = long_documents(make_corpus, tmp_path, policy)
    texts = documents_of(corpus, "mine", TRAIN)
    assert len(texts) == documents
    assert any(len(text) == 800 for text in texts) == (policy == "split")
    assert counts_of(corpus, "mine").get(f"long_{policy}") == (None if policy == "split" else 1)


def test_long_documents_are_refused_above_the_limit(make_corpus, tmp_path):
    message = r"data.limit_tokens=90: data.sources.mine has a document of \d+ tokens; raise the limit; try data.long_"
    with pytest.raises(ConfigError, match=message):
        long_documents(make_corpus, tmp_path, "refuse")
    sources = {"mine": {"path": str(write_texts(tmp_path / "texts", 1, words=5))}}
    tokens = counts_of(make_corpus(sources, held_out=0.0), "mine")["tokens"] - 2  # BOS, EOS
    make_corpus(sources, held_out=0.0, limit_tokens=tokens, long_documents="refuse")
    with pytest.raises(ConfigError, match=rf"a document of {tokens} tokens"):
        make_corpus(sources, held_out=0.0, limit_tokens=tokens - 1, long_documents="refuse")


def test_sources_without_text_are_refused(make_corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=r"data.sources.mine: has no text to train on \(dropped_empty: 1\)"):
        make_corpus({"mine": {"path": str(tmp_path / "empty")}})
    held_out = write_texts(tmp_path / "all", 3)
    with pytest.raises(ConfigError, match=r"its 3 documents are held out; lower data.held_out"):
        make_corpus({"mine": {"path": str(held_out)}}, held_out=0.999999)


def test_a_failed_preparation_leaves_nothing(tmp_path, sources, monkeypatch):
    config = make_config(tmp_path / "cache", sources)
    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "add", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(DataError, match=r"No space left on device\): free some space or set data.cache"):
            prepare(config, silent)
    assert len(prepare(config, silent).stream("mine", TRAIN)) > 0
    shutil.rmtree(tmp_path / "cache")
    (Path(sources["mine"]["path"]) / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        prepare(config, silent)
    assert not list((tmp_path / "cache").rglob("*.bin"))
    corpus = prepare(make_config(tmp_path / "cache", sources, undecodable="drop"), silent)
    assert counts_of(corpus, "mine")["dropped_undecodable"] == 1


def damage(path: Path, how: str) -> None:
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(bytes(content))
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize(
    "how, state",
    [("flip", "does not match its SHA-256"), ("truncate", r"has \d+ bytes instead of \d+"), ("remove", "is missing")],
)
def test_damaged_shards_are_named(copy, how, state):
    open_corpus(copy).verify()
    damage(copy / "mine-train-00000.bin", how)
    with pytest.raises(DataError, match=rf"mine-train-00000.bin {state}: remove {copy} and run again"):
        open_corpus(copy).verify()


def test_ranks_share_the_verification(tmp_path, make_corpus):
    corpus = make_corpus({name: {"path": str(write_texts(tmp_path / name, 9, seed=ord(name)))} for name in "ab"})
    for how, message in (("flip", "does not match"), ("remove", "cannot be read")):
        damage(corpus.directory / "b-train-00000.bin", how)
        failed = []
        for part in range(4):
            try:
                corpus.verify(part, 4)
            except DataError as error:
                assert f"b-train-00000.bin {message}" in str(error)
                failed.append(part)
        assert len(failed) == 1


NO_SOURCES = '{"format": 1, "sources": [], "tokenizer": {"vocab_size": 300}}'


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 99}', NO_SOURCES, None])
def test_a_damaged_manifest_is_named(copy, content):
    path = copy / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=rf"{path} .*: remove {copy} and run again") as caught:
        open_corpus(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kind": "klingon"}', None, "other"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_source.json"])
def test_a_damaged_tokenizer_is_named(copy, file, content):
    path = copy / file
    message = rf"{copy}.*: remove {copy} and run again"
    if content is None:
        path.unlink()
    elif content == "other":
        other = json.loads((copy / "tokenizer.json").read_text())
        other["added_tokens"][0]["lstrip"] = True
        (copy / "tokenizer.json").write_text(json.dumps(other))
        message = rf"{copy} holds another tokenizer"
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        _ = open_corpus(copy).tokenizer
    assert "\n" not in str(caught.value) and (file in str(caught.value) or content == "other")
