"""From sources to a directory of tokens: made once, found again, and never trusted when it is damaged."""

from __future__ import annotations

import base64
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError, DataError
from data.corpus import HELD_OUT, TRAIN, Corpus, _sample, open_corpus, prepare
from data.sources import make_source
from data.tokens import TokenWriter
from tests.data.conftest import make_config, silent, write_texts


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    folder = write_texts(tmp_path / "texts", 20)
    for path in folder.iterdir():
        path.write_text(path.read_text() + "Grüße, 世界")  # characters and bytes are not the same number
    return {"mine": {"path": str(folder)}}


def texts_of(corpus: Corpus, source: str, split: str) -> list[str]:
    """Documents as the stream has them: cut at BOS, the last token of each is EOS."""
    stream, tokenizer = corpus.stream(source, split), corpus.tokenizer
    documents: list[list[int]] = []
    for token in stream.window(0, len(stream)).tolist():
        if token == tokenizer.bos_id:
            documents.append([])
        documents[-1].append(token)
    assert all(document[-1] == tokenizer.eos_id for document in documents)
    return [tokenizer.decode(document) for document in documents]


def test_every_document_is_in_one_stream(make_corpus: Callable[..., Corpus], sources: dict[str, Any]) -> None:
    corpus = make_corpus(sources)
    train, held_out = (texts_of(corpus, "mine", split) for split in (TRAIN, HELD_OUT))
    written = [path.read_text() for path in Path(sources["mine"]["path"]).iterdir()]
    assert sorted(train + held_out) == sorted(written) and 0 < len(held_out) < 10
    counts = corpus.manifest["sources"]["mine"][TRAIN]["counts"]
    assert counts["documents"] == len(train) and counts["bytes"] == sum(len(text.encode()) for text in train)
    assert counts["tokens"] == len(corpus.stream("mine", TRAIN))


def test_the_cache_is_found_again(tmp_path: Path, sources: dict[str, Any]) -> None:
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


@pytest.mark.parametrize(
    "settings",
    [{"held_out": 0.3}, {"tokenizer": {"vocab_size": 310}}, {"limit_tokens": 500, "long_documents": "truncate"}],
)
def test_what_changes_the_tokens_changes_the_directory(
    tmp_path: Path, sources: dict[str, Any], settings: dict[str, Any]
) -> None:
    usual, other = (prepare(make_config(tmp_path / "cache", sources, **keys), silent) for keys in ({}, settings))
    assert other.directory != usual.directory and other.fingerprint != usual.fingerprint


def test_changed_text_is_tokenised_anew(tmp_path: Path, sources: dict[str, Any]) -> None:
    config = make_config(tmp_path / "cache", sources)
    before = prepare(config, silent)
    (Path(sources["mine"]["path"]) / "000.txt").write_text("another text altogether")
    assert prepare(config, silent).fingerprint != before.fingerprint


def test_another_tokenizer_under_the_same_name_makes_tokens_anew(tmp_path: Path, sources: dict[str, Any]) -> None:
    path = tmp_path / "ranks"
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    settings = {"tokenizer": {"kind": "tiktoken", "path": str(path)}}
    found = []
    for ranks in (lines, [*lines, f"{base64.b64encode(b'et').decode()} 256\n"]):
        path.write_text("".join(ranks))
        found.append(prepare(make_config(tmp_path / "cache", sources, **settings), silent))
    assert found[0].directory != found[1].directory
    assert len(found[1].stream("mine", TRAIN)) < len(found[0].stream("mine", TRAIN))


def test_the_tokenizer_is_trained_on_training_text_alone(tmp_path: Path, sources: dict[str, Any]) -> None:
    config = make_config(tmp_path / "cache", sources)
    source = make_source("mine", config.sources["mine"], config)
    sides = {side: [d.text for d in source.documents() if d.held_out is side] for side in (True, False)}
    assert list(_sample([source], 1 << 30)) == sides[False] and sides[True]


def test_tokens_are_used_without_their_sources(tmp_path: Path, sources: dict[str, Any]) -> None:
    made = prepare(make_config(tmp_path / "cache", sources), silent)
    shutil.copytree(made.directory, tmp_path / "tokens")
    shutil.rmtree(sources["mine"]["path"])
    used = prepare(make_config(tmp_path / "cache", sources, tokens=str(tmp_path / "tokens")), silent)
    assert used.fingerprint == made.fingerprint and used.tokenizer.fingerprint == made.tokenizer.fingerprint


@pytest.mark.parametrize("shard_tokens", [100, 1 << 20])
def test_a_corpus_in_many_shards_is_the_same(
    make_corpus: Callable[..., Corpus], sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shard_tokens: int
) -> None:
    usual = TokenWriter.__init__
    monkeypatch.setattr(TokenWriter, "__init__", lambda self, *a: usual(self, *a, shard_tokens))
    corpus = make_corpus(sources)
    many = len(corpus.manifest["sources"]["mine"][TRAIN]["shards"]) > 20
    assert many == (shard_tokens == 100)
    assert len(texts_of(corpus, "mine", TRAIN)) + len(texts_of(corpus, "mine", HELD_OUT)) == 20


def long_documents(make_corpus: Callable[..., Corpus], tmp_path: Path, policy: str) -> Corpus:
    folder = write_texts(tmp_path / "short", 8, words=3)
    (folder / "long.txt").write_text("a b c d " * 100)
    held_out = write_texts(tmp_path / "held_out", 2, words=3)
    source = {"path": str(folder), "held_out_path": str(held_out)}
    return make_corpus({"mine": source}, limit_tokens=90, long_documents=policy)


def test_long_documents(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    for number, (policy, documents) in enumerate({"split": 9, "truncate": 9, "drop": 8}.items()):
        corpus = long_documents(make_corpus, tmp_path / str(number), policy)
        texts = texts_of(corpus, "mine", TRAIN)
        counts = corpus.manifest["sources"]["mine"][TRAIN]["counts"]
        assert len(texts) == documents
        assert any(len(text) == 800 for text in texts) == (policy == "split")
        assert counts.get(f"long_{policy}") == (None if policy == "split" else 1)
    message = r"data.limit_tokens=90: data.sources.mine has a document of \d+ tokens; raise the limit; try data.long_"
    with pytest.raises(ConfigError, match=message):
        long_documents(make_corpus, tmp_path / "refuse", "refuse")


def test_a_document_of_just_the_limit_is_kept(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    sources = {"mine": {"path": str(write_texts(tmp_path / "texts", 1, words=5))}}
    tokens = make_corpus(sources, held_out=0.0).manifest["sources"]["mine"][TRAIN]["counts"]["tokens"] - 2  # BOS, EOS
    make_corpus(sources, held_out=0.0, limit_tokens=tokens, long_documents="refuse")
    with pytest.raises(ConfigError, match=rf"a document of {tokens} tokens"):
        make_corpus(sources, held_out=0.0, limit_tokens=tokens - 1, long_documents="refuse")


def test_sources_without_text_are_refused(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=r"data.sources.mine: has no text to train on \(dropped_empty: 1\)"):
        make_corpus({"mine": {"path": str(tmp_path / "empty")}})
    held_out = write_texts(tmp_path / "all", 3)
    with pytest.raises(ConfigError, match=r"its 3 documents are held out; lower data.held_out"):
        make_corpus({"mine": {"path": str(held_out)}}, held_out=0.999999)


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, sources: dict[str, Any]) -> None:
    (Path(sources["mine"]["path"]) / "bad.txt").write_bytes(b"\xff")
    config = make_config(tmp_path / "cache", sources)
    with pytest.raises(ConfigError, match="not UTF-8"):
        prepare(config, silent)
    assert not list((tmp_path / "cache").rglob("*.bin"))
    corpus = prepare(make_config(tmp_path / "cache", sources, undecodable="drop"), silent)
    assert corpus.manifest["sources"]["mine"][TRAIN]["counts"]["dropped_undecodable"] == 1


def test_a_full_disk_is_named(tmp_path: Path, sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: TokenWriter, document: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = make_config(tmp_path / "cache", sources)
    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "add", full)
        with pytest.raises(DataError, match=r"No space left on device\): free some space or set data.cache"):
            prepare(config, silent)
    assert len(prepare(config, silent).stream("mine", TRAIN)) > 0


def damage(path: Path, how: str) -> None:
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(bytes(content))
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damaged_shards_are_named_and_made_anew(tmp_path: Path, sources: dict[str, Any], how: str) -> None:
    config = make_config(tmp_path / "cache", sources)
    whole = prepare(config, silent)
    whole.verify()
    damage(whole.directory / "mine-train-00000.bin", how)
    with pytest.raises(DataError, match=rf"mine-train-00000.bin .*: remove {whole.directory} and run again"):
        prepare(config, silent).verify()
    shutil.rmtree(whole.directory)
    again = prepare(config, silent)
    again.verify()
    assert again.fingerprint == whole.fingerprint


def test_ranks_share_the_verification(tmp_path: Path, make_corpus: Callable[..., Corpus]) -> None:
    corpus = make_corpus({name: {"path": str(write_texts(tmp_path / name, 9, seed=ord(name)))} for name in "ab"})
    damage(corpus.directory / "b-train-00000.bin", "flip")
    failed = []
    for part in range(4):
        try:
            corpus.verify(part, 4)
        except DataError:
            failed.append(part)
    assert len(failed) == 1


NO_SOURCES = '{"format": 1, "sources": [], "tokenizer": {"vocab_size": 300}}'


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 99}', NO_SOURCES, None])
def test_a_damaged_manifest_is_named(
    make_corpus: Callable[..., Corpus], sources: dict[str, Any], content: str | None
) -> None:
    directory = make_corpus(sources).directory
    path = directory / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=rf"{path} .*: remove {directory} and run again") as caught:
        open_corpus(directory)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"manifest.json"):
        make_corpus(sources)


def test_another_tokenizer_in_the_directory_is_noticed(
    make_corpus: Callable[..., Corpus], sources: dict[str, Any]
) -> None:
    corpus = make_corpus(sources)
    path = corpus.directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][0]["lstrip"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="another tokenizer"):
        _ = open_corpus(corpus.directory).tokenizer


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kind": "klingon"}', None])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_source.json"])
def test_a_damaged_tokenizer_is_named(
    make_corpus: Callable[..., Corpus], sources: dict[str, Any], file: str, content: str | None
) -> None:
    path = make_corpus(sources).directory / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=rf"{path.parent}.*: remove {path.parent} and run again") as caught:
        _ = open_corpus(path.parent).tokenizer
    assert "\n" not in str(caught.value) and file in str(caught.value)


def test_a_shard_that_vanishes_after_opening_is_named(
    make_corpus: Callable[..., Corpus], sources: dict[str, Any]
) -> None:
    corpus = make_corpus(sources)
    damage(corpus.directory / "mine-train-00000.bin", "remove")
    with pytest.raises(DataError, match=r"mine-train-00000.bin cannot be read .*: remove"):
        corpus.verify()


def test_what_a_killed_process_leaves_is_not_taken_for_a_corpus(tmp_path: Path, sources: dict[str, Any]) -> None:
    """It dies before the rename: its scratch directory lacks the manifest, and nobody looks for it under that name."""
    config = make_config(tmp_path / "cache", sources)
    whole = prepare(config, silent)
    half = whole.directory.with_name(f".{whole.directory.name}.1.tmp")
    whole.directory.rename(half)
    (half / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest.json"):
        open_corpus(half)
    lines = list[str]()
    assert prepare(config, lines.append).fingerprint == whole.fingerprint and lines


def test_a_directory_without_tokens_is_refused(tmp_path: Path, sources: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data.tokens=.*: is no directory of tokens .*leviathan tokenize"):
        prepare(make_config(tmp_path / "cache", sources, tokens=str(tmp_path)), silent)


def test_bits_per_byte_follow_from_tokens(make_corpus: Callable[..., Corpus], sources: dict[str, Any]) -> None:
    """The bytes that a stream's tokens stand for are the bytes of its text."""
    corpus = make_corpus(sources)
    stream, sizes = corpus.stream("mine", TRAIN), corpus.tokenizer.token_bytes()
    counted = int(sizes[stream.window(0, len(stream))].sum())
    assert counted == corpus.manifest["sources"]["mine"][TRAIN]["counts"]["bytes"]
