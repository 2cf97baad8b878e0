"""tokenizer.json, tiktoken rank files and the description of a stored tokenizer."""

from __future__ import annotations

import base64
import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import CheckpointError, ConfigError, DataError
from data.config import TokenizerConfig, TokenizerKind
from data.tokenizer import Tokenizer, from_file, load_tokenizer, vocabulary_of_file
from tests.fuzz.mutations import assert_reads_or_refuses, files, json_files
from train.eval.scoring_model import _tokenizer


def bpe() -> dict[str, Any]:
    """Return the content of a small tokenizer.json with every kind of part."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "Ġ": 3}, [("a", "b")], unk_token="a"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "y")])
    split = pre_tokenizers.Split(tokenizers.Regex(r"\s+|\w+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.ByteLevel()])
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 4)])
    return json.loads(made.to_str())


JSON = bpe()
RANKS = b"".join(base64.b64encode(bytes([byte])) + f" {byte}\n".encode() for byte in range(256)) + b"YWI= 256\n"
SAVED_JSON = {"kind": "tokenizer_json", "bos": "<s>", "eos": "</s>"}
SAVED_RANKS = {"kind": "tiktoken", "pattern": r"\w+|\s+", "special_tokens": 8, "bos": "<s>", "eos": "</s>"}
FOR_TRANSFORMERS = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}


def used(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert 0 <= tokenizer.bos_id < tokenizer.vocab_size and 0 <= tokenizer.eos_id < tokenizer.vocab_size


@given(json_files(JSON))
@example(b"[" * 100_000)
@example(json.dumps(JSON).replace('"ab": 2', '"ab": 4294967290').encode())
@example(json.dumps({**JSON, "added_tokens": [], "model": {**JSON["model"], "vocab": {}, "merges": []}}).encode())
def test_any_tokenizer_json_is_read_or_refused(place, content):
    path = place / "tokenizer.json"
    path.write_bytes(content)
    config = TokenizerConfig(kind=TokenizerKind.tokenizer_json, path=str(path), bos="<s>", eos="</s>")
    assert_reads_or_refuses(lambda: used(from_file(config)), ConfigError, DataError)
    assert_reads_or_refuses(lambda: vocabulary_of_file(path))


@given(files(RANKS))
def test_any_rank_file_is_read_or_refused(place, content):
    path = place / "ranks"
    path.write_bytes(content)
    config = TokenizerConfig(kind=TokenizerKind.tiktoken, path=str(path), bos="<s>", eos="</s>")
    assert_reads_or_refuses(lambda: used(from_file(config)), ConfigError, DataError)


@example(json.dumps({**SAVED_RANKS, "special_tokens": 10**12}).encode())
@example(b"[" * 100_000)
@given(st.sampled_from([SAVED_JSON, SAVED_RANKS]).flatmap(json_files))
def test_any_stored_tokenizer_is_read_or_refused(place, content):
    (place / "tokenizer.json").write_text(json.dumps(JSON))
    (place / "tokenizer.model").write_bytes(RANKS)
    (place / "tokenizer_source.json").write_bytes(content)
    assert_reads_or_refuses(lambda: used(load_tokenizer(place)), ConfigError, DataError)


@given(json_files(FOR_TRANSFORMERS))
@example(json.dumps({"bos_token": 1, "eos_token": {"content": None}}).encode())
def test_any_tokenizer_of_transformers_is_read_or_refused(place, content):
    (place / "tokenizer.json").write_text(json.dumps(JSON))
    (place / "tokenizer_config.json").write_bytes(content)
    assert_reads_or_refuses(lambda: used(_tokenizer(place)), ConfigError, DataError, CheckpointError)
