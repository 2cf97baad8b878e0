"""Configurations that cannot work are refused with the key and the fix."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from core.config import build, config_directory
from core.errors import ConfigError
from data.config import DataConfig

GOOD: dict[str, Any] = {"sources": {"code": {"kind": "builtin", "section": "code"}}}


def assert_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, values, "data")


@pytest.mark.parametrize("name", ["builtin", "files", "huggingface", "tokens"])
def test_shipped_configurations_fit_the_schema(name: str) -> None:
    values = yaml.safe_load((config_directory() / "data" / f"{name}.yaml").read_text())
    if name != "builtin":  # the user must say where the data is
        assert_refused(values, "data")
        values = yaml.safe_load((config_directory() / "data" / f"{name}.yaml").read_text().replace("???", "here"))
    assert isinstance(build(DataConfig, values, "data"), DataConfig)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "builtin"}, r"data.sources.x.section: .*; try code, tests, docstrings or pydoc"),
        ({"kind": "files"}, r"data.sources.x.path: a source of kind files needs a path"),
        ({"kind": "huggingface"}, r"data.sources.x.path: a source of kind huggingface needs a path"),
        (
            {"path": "a", "weight": 0.0},
            r"data.sources.x.weight=0.0: must be positive and finite; to drop the source, remove",
        ),
        ({"path": "a", "weight": float("nan")}, r"data.sources.x.weight=nan: must be positive and finite"),
        ({"path": "a", "max_epochs": 0.0}, r"data.sources.x.max_epochs=0.0: must be positive"),
        ({"path": "a", "max_bytes": 0}, r"data.sources.x.max_bytes=0: must be positive"),
        ({"path": "a", "kind": "huggingface", "held_out_path": "b"}, r"data.sources.x.held_out_path=b: works with"),
        ({"path": "a", "wieght": 1.0}, r"data.sources.x.wieght: no such key; try weight"),
        ({"path": "a", "kind": "csv"}, r"data.sources.x.kind"),
    ],
)
def test_sources(source: dict[str, Any], message: str) -> None:
    assert_refused({"sources": {"x": source}}, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": {}}, r"data.sources: name at least one source"),
        ({"sources": {"a/b": {"path": "x"}}}, r"data.sources.a/b: a name of a source has letters"),
        ({"held_out": 1.0}, r"data.held_out=1.0: must lie in \[0, 1\)"),
        ({"long_documents": "truncate"}, r"data.limit_tokens: long_documents=truncate needs a limit"),
        ({"limit_tokens": 0}, r"data.limit_tokens=0: must be positive"),
        ({"tokenizer": {"vocab_size": 100}}, r"data.tokenizer.vocab_size=100: must hold 256 bytes"),
        ({"tokenizer": {"kind": "tiktoken"}}, r"data.tokenizer.path: a tokenizer of kind tiktoken needs its file"),
        ({"tokenizer": {"bos": "<s>", "eos": "<s>"}}, r"data.tokenizer.eos=<s>: must differ from bos"),
        ({"tokenizer": {"special_tokens": 1}}, r"data.tokenizer.special_tokens=1: must hold"),
        ({"tokenizer": {"train_bytes": 0}}, r"data.tokenizer.train_bytes=0: must be positive"),
    ],
)
def test_settings(values: dict[str, Any], message: str) -> None:
    assert_refused(GOOD | values, message)


def test_valid_settings_are_accepted() -> None:
    cut = build(DataConfig, GOOD | {"long_documents": "truncate", "limit_tokens": 5, "held_out": 0.0}, "data")
    assert cut.limit_tokens == 5 and cut.held_out == 0
    assert build(DataConfig, {"tokens": "somewhere"}, "data").tokens == "somewhere"
