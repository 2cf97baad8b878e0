"""Configurations that cannot work are refused with the key and the fix."""

from __future__ import annotations

import pytest
import yaml

from core.config import build, config_directory
from core.errors import ConfigError
from data.config import DataConfig


@pytest.mark.parametrize("name", ["builtin", "files", "huggingface", "tokens"])
def test_shipped_configurations_fit_the_schema(name):
    text = (config_directory() / "data" / f"{name}.yaml").read_text()
    if name != "builtin":  # the others need a path from the user
        with pytest.raises(ConfigError, match="data"):
            build(DataConfig, yaml.safe_load(text), "data")
    build(DataConfig, yaml.safe_load(text.replace("???", "here")), "data")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "builtin"}, r"section: .*; try code, tests, docstrings or pydoc"),
        ({"kind": "files"}, r"path: a source of kind files needs a path"),
        ({"weight": 0.0}, r"weight=0.0: must be positive and finite; to drop the source, omit it"),
        ({"weight": float("nan")}, r"weight=nan: must be a finite number"),
        ({"max_epochs": 0.0}, r"max_epochs=0.0: must be positive"),
        ({"max_bytes": 0}, r"max_bytes=0: must be positive"),
        ({"kind": "huggingface", "path": "a", "held_out_path": "b"}, r"held_out_path=b: requires kind=files"),
        ({"wieght": 1.0}, r"wieght: no such key; try data.sources.x.weight"),
        ({"kind": "csv"}, r"kind"),
    ],
)
def test_sources(source, message):
    path = {} if "kind" in source else {"path": "a"}
    with pytest.raises(ConfigError, match=rf"data.sources.x.{message}"):
        build(DataConfig, {"sources": {"x": source | path}}, "data")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": {}}, r"sources: name at least one source"),
        ({"sources": {"a/b": {"path": "x"}}}, r"sources.a/b: a name of a source has letters"),
        ({"held_out": 1.0}, r"held_out=1.0: must lie in \[0, 1\)"),
        ({"long_documents": "truncate"}, r"limit_tokens: long_documents=truncate needs a limit"),
        ({"images": {}, "filter": {"on_error": "keep"}}, r"filter.on_error=keep: .* cannot be used; try drop or fail"),
        ({"limit_tokens": 0}, r"limit_tokens=0: must be positive"),
        ({"packing": "best_fit"}, r"pack_seq_len: packing=best_fit needs the length"),
        ({"pack_seq_len": 1}, r"pack_seq_len=1: must hold"),
        ({"packing": "best_fit", "pack_seq_len": 64, "align": 32}, r"align=32: needs packing=greedy"),
        ({"prefetch": -1}, r"prefetch=-1: must not be negative"),
        ({"tokenizer": {"vocab_size": 100}}, r"tokenizer.vocab_size=100: must hold 256 bytes"),
        ({"tokenizer": {"kind": "tiktoken"}}, r"tokenizer.path: a tokenizer of kind tiktoken needs its file"),
        ({"tokenizer": {"bos": "<s>", "eos": "<s>"}}, r"tokenizer.eos=<s>: must differ from bos"),
        ({"tokenizer": {"special_tokens": 1}}, r"tokenizer.special_tokens=1: must hold"),
        ({"tokenizer": {"train_bytes": 0}}, r"tokenizer.train_bytes=0: must be positive"),
    ],
)
def test_settings(values, message):
    with pytest.raises(ConfigError, match=rf"data.{message}"):
        build(DataConfig, {"sources": {"code": {"kind": "builtin", "section": "code"}}, **values}, "data")


def test_every_import_path_is_listed():
    """A stored configuration is a stranger's: what is not listed here would be imported from it."""
    own = {"kind": "evil.scorer:Mine"}
    rated = {"kind": "pass_rate", "url": "http://h", "judge": "j", "verifier": "evil.check:right"}
    scorer = {"kind": "ensemble", "members": [own, {"kind": "ensemble", "members": [rated, {"kind": "random"}]}]}
    source = {"kind": "evil.source:Mine", "weight": 1.0}
    config = build(DataConfig, {"sources": {"text": source}, "filter": {"scorer": scorer}})
    assert config.import_paths() == {
        "sources.text.kind": "evil.source:Mine",
        "filter.scorer.members[0].kind": "evil.scorer:Mine",
        "filter.scorer.members[1].members[0].verifier": "evil.check:right",
    }
