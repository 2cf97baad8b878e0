"""Tokenizers: text survives the round trip, special tokens are never text, and bytes are counted exactly."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import ConfigError, DataError
from data.config import TokenizerConfig, TokenizerKind
from data.tokenizer import LONGEST_WORD, Tokenizer, from_file, load_tokenizer, train_bpe

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "Grüße, 世界! 🙂\tελλ\r\n\x00 end",
    "<|begin_of_text|> is only text here, and <|end_of_text|> too",
    "",
    "    \n\n   ",
]


@pytest.fixture
def bpe(tmp_path: Path) -> Tokenizer:
    return train_bpe(TEXTS * 20, TokenizerConfig(vocab_size=320), tmp_path / "cache")


def write_ranks(path: Path) -> Path:
    """Write a tiktoken file with the 256 bytes and a few longer tokens."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"re", b"tu", b"retu", b" x", b"  ", b"    "]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))
    return path


@pytest.fixture
def tiktoken(tmp_path: Path) -> Tokenizer:
    path = write_ranks(tmp_path / "tokenizer.model")
    return from_file(TokenizerConfig(kind=TokenizerKind.tiktoken, path=str(path), special_tokens=8))


@pytest.fixture(params=["bpe", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_text_survives_and_bytes_add_up(tokenizer):
    """Text that looks like a special token is ordinary text; special tokens decode to nothing."""
    sizes, special = tokenizer.token_bytes(), (tokenizer.bos_id, tokenizer.eos_id)
    assert len(sizes) == tokenizer.vocab_size and not sizes[list(special)].any()
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert all(0 <= i < tokenizer.vocab_size and i not in special for i in ids)
        assert tokenizer.decode(ids) == tokenizer.decode([special[0], *ids, special[1]]) == text
        assert sum(sizes[i] for i in ids) == len(text.encode())


def test_every_character_survives(tokenizer):
    """Encode all characters below the surrogates and every 37th above: every byte that UTF-8 uses occurs."""
    characters = [chr(code) for code in [*range(0xD800), *range(0xE000, 0x110000, 37)]]
    texts = ["".join(characters[i : i + 1000]) for i in range(0, len(characters), 1000)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts
    assert len(set("".join(texts).encode())) == 256 - len((0xC0, 0xC1, *range(0xF5, 0x100)))


def test_every_artefact_carries_its_tokenizer(tokenizer, tmp_path):
    folder = tmp_path / "artefact"
    folder.mkdir()
    tokenizer.save(folder)
    again = load_tokenizer(folder)
    assert [list(i) for i in again.encode(TEXTS)] == [list(i) for i in tokenizer.encode(TEXTS)]
    for name in ("fingerprint", "vocab_size", "bos_id", "eos_id"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_fingerprints_follow_what_changes_an_encoding(tiktoken, tmp_path):
    path = write_ranks(tmp_path / "ranks")
    usual = TokenizerConfig(kind=TokenizerKind.tiktoken, path=str(path), special_tokens=8)
    assert from_file(usual).fingerprint == tiktoken.fingerprint
    changes = {"pattern": r"\s+|\S+", "special_tokens": 9, "bos": "<s>", "eos": "</s>"}.items()
    found = {from_file(replace(usual, **{key: value})).fingerprint for key, value in changes} | {tiktoken.fingerprint}
    path.write_text(path.read_text() + f"{base64.b64encode(b'new').decode()} 262\n")
    assert len(found | {from_file(usual).fingerprint}) == 6


@pytest.mark.parametrize("word", ["x" * 200_000, "".join(map(str, range(40_000))), "-_" * 100_000, " " * 200_000])
def test_long_words_are_cut_for_training(word, tmp_path, monkeypatch):
    """Ordinary texts are not, so they have the tokenizer that they had."""
    fed = list[str]()

    class Fed(Exception):
        """The trainer has got its texts."""

    class Library(SimpleNamespace):
        def __init__(self, model: object) -> None: ...

        def train_from_iterator(self, sample: list[str], trainer: object) -> None:
            fed.extend(sample)
            raise Fed

    monkeypatch.setattr("tokenizers.Tokenizer", Library)
    with pytest.raises(Fed):
        train_bpe([*TEXTS, f"before {word} after", *TEXTS], TokenizerConfig(vocab_size=320), tmp_path)
    assert fed[: len(TEXTS)] == TEXTS == fed[-len(TEXTS) :]
    pieces = fed[len(TEXTS) : -len(TEXTS)]
    assert "".join(pieces) == f"before {word} after"
    assert len(pieces) >= len(word) // LONGEST_WORD and max(map(len, pieces)) <= LONGEST_WORD + len("before  ")


def test_training_is_repeatable_and_cached_by_content(tmp_path):
    config = TokenizerConfig(vocab_size=320)
    one, other = (train_bpe(TEXTS, config, tmp_path / name) for name in ("a", "b"))
    assert one.fingerprint == other.fingerprint
    train_bpe(TEXTS, config, tmp_path / "a")
    assert len(list((tmp_path / "a" / "tokenizers").iterdir())) == 1
    assert train_bpe([*TEXTS, "qqq" * 9], config, tmp_path / "a").fingerprint != one.fingerprint
    assert len(list((tmp_path / "a" / "tokenizers").iterdir())) == 2


def test_truncation_in_a_file_loses_no_text(bpe, tmp_path):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    again = from_file(TokenizerConfig(kind=TokenizerKind.tokenizer_json, path=str(path)))
    assert [list(i) for i in again.encode(TEXTS)] == [list(i) for i in bpe.encode(TEXTS)]


def test_bytes_of_byte_fallback_and_of_added_words(tmp_path):
    """Use a SentencePiece-style vocabulary with an added token that is not special."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Library

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁ab": 3, "ü": 4, "<0xC3>": 5, "▁": 6}
    library = Library(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens([AddedToken("<indent>", special=False)])
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    config = TokenizerConfig(kind=TokenizerKind.tokenizer_json, path=str(path), bos="<s>", eos="</s>")
    assert from_file(config).token_bytes()[1:].tolist() == [0, 0, 3, 2, 1, 1, 8]


def test_tiktoken_ids_and_pieces(tiktoken, monkeypatch):
    """Ids of special tokens follow those of the ranks, as in Llama 4. Long texts are encoded in pieces."""
    assert (tiktoken.bos_id, tiktoken.eos_id, tiktoken.vocab_size) == (262, 263, 270)
    monkeypatch.setattr(type(tiktoken), "MAX_CHARACTERS", 5)
    texts = ["return x " * 5, "", "ab"]
    assert [tiktoken.decode(ids) for ids in tiktoken.encode(texts)] == texts


BROKEN = [
    (lambda lines: [*lines[:2], "not base64", *lines[3:]], {}, r"ranks:3 is not a line of a tiktoken file"),
    (lambda lines: lines[:-2] + lines[-1:], {}, "without a gap"),
    (lambda lines: lines[:200], {}, "256 bytes"),
    (lambda lines: lines, {"pattern": "("}, r"data.tokenizer.pattern=\(: is not a regular expression"),
    (lambda lines: lines, {"path": "/nowhere"}, r"data.tokenizer.path=/nowhere: no such file"),
]


@pytest.mark.parametrize("change, keys, message", BROKEN)
def test_broken_rank_files_are_named(tmp_path, change, keys, message):
    path = write_ranks(tmp_path / "ranks")
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(DataError if not keys else ConfigError, match=message):
        from_file(TokenizerConfig(**{"kind": TokenizerKind.tiktoken, "path": str(path), **keys}))


def test_broken_json_files_are_named(tmp_path, bpe):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match=r"data.tokenizer.bos=<s>: .* has no such token; try <\|begin_of_text\|>"):
        from_file(TokenizerConfig(kind=TokenizerKind.tokenizer_json, path=str(path), bos="<s>"))
    path.write_text('{"version": 1}')
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer.json: "):
        from_file(TokenizerConfig(kind=TokenizerKind.tokenizer_json, path=str(path)))
