"""Overrides, YAML, JSON, stored configurations and the bases of a transfer: any text is read or refused."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.config import build, load, load_stored, plain
from core.errors import ConfigError, UnreadableFileError
from core.files import read_json, read_text
from core.overrides import expand, parse, quoted
from core.yaml_file import read_yaml
from launch.metap.transfer import read_base
from tests.fuzz.mutations import FEWER, assert_reads_or_refuses, files, hostile, json_bytes, json_files, spoiled
from train.config import TrainConfig
from train.metap.hyperparameters import as_base
from train.run_directory import read_config

GROUPS = {"model": ["tiny", "small"], "data": ["files"]}
OVERRIDES = [
    *(
        "optimizer.lr=3e-4",
        "+data.sources.web={kind: files, path: '/x y', weight: 0.5}",
        "model=tiny",
        "~data.sources.a",
    ),
    *("a=1,2,3", "a=range(0,4)", "a='it''s'", 'a="b"', "a=[1,[2,{b:3}]]", "++a.b@c=null", "run.name=<s>", "a=${b}"),
    *("a=choice(1,2)", "a=shuffle(1,2)", "a=tag(x,1)", "a=sort(3,1)", "a=int(x)", "a=glob(*)", "a=interval(0,1)"),
]
YAML = b"# a comment\na: &x [1, 2.5e3, 'b']\nb: {c: *x, d: null}\ne: |\n  text\n  more\nf: 0x1F\ng: 2026-01-01\n"


@dataclass(frozen=True)
class Leaf:
    path: str = "x"
    weight: float = 1.0


@dataclass(frozen=True)
class Mixed:
    a: int = 1
    lr: float | None = None
    on: bool = False
    name: str = "x"
    many: list[str] = field(default_factory=list)
    leaf: Leaf = field(default_factory=Leaf)
    leaves: dict[str, Leaf] = field(default_factory=dict)


@given(st.sampled_from(OVERRIDES).map(str.encode).flatmap(files), st.booleans())
@example(b"~data.s/urces.a", False)
@example(b"optimi:er.lr=3e-4", True)
@example(b"a=" + b"9" * 5000, False)
@example(b"o" + b"9" * 5000 + b"ptimizer.lr=3e-4", False)
@example(b"model=" + b"9" * 5000, False)
@example(b"a" + b"9" * 5000 + b"[=1,2", False)
def test_any_override_is_parsed_or_refused(content, sweeps):
    text = content.decode(errors="surrogateescape")  # as Python decodes the command line
    if not assert_reads_or_refuses(lambda: parse(text, GROUPS, sweeps), ConfigError):
        return
    for one in assert_reads_or_refuses(lambda: expand([text], GROUPS), ConfigError) or []:
        assert_reads_or_refuses(lambda one=one: load("mixed", Mixed, one), ConfigError)
        break


@given(
    st.sampled_from(["a", "lr", "on", "name", "many", "leaf", "leaf.path", "leaves", "leaves.b", "b", ""]), hostile()
)
@FEWER
def test_any_value_of_a_key_is_parsed_or_refused(key, value):
    word = f"{key}={value}" if isinstance(value, str) else f"{key}={json_bytes(value).decode()}"
    assert_reads_or_refuses(lambda: load("mixed", Mixed, [word]), ConfigError)


@given(st.one_of(files(YAML), files(json_bytes({"a": [1, {"b": None}], "c": 1.5}))))
def test_any_file_is_text_yaml_or_json_or_refused(place, content):
    path = place / "any"
    path.write_bytes(content)
    for read in (read_text, read_yaml, read_json):
        assert_reads_or_refuses(lambda read=read: read(path), UnreadableFileError)


MIXED = {
    "a": 2,
    "lr": 0.5,
    "on": True,
    "name": "y",
    "many": ["b"],
    "leaf": {"path": "z"},
    "leaves": {"w": {"path": "v"}},
}


@given(spoiled(MIXED))
@example({**MIXED, "leaf": []})
@FEWER
def test_any_plain_values_are_built_or_refused(values):
    assert_reads_or_refuses(lambda: build(Mixed, values), ConfigError)
    if isinstance(values, dict):
        assert_reads_or_refuses(lambda: load_stored(values, Mixed, ["leaf.path=b"]), ConfigError)


def sections(tree: dict) -> st.SearchStrategy[dict]:
    """One or two sections of a configuration: reading all of them takes most of the time."""
    return st.sets(st.sampled_from(sorted(tree)), min_size=1, max_size=2).map(
        lambda names: {k: tree[k] for k in sorted(names)}
    )


RUN = load("train", TrainConfig, ["hparam=none", "+phases=[{name: b, steps: 4}]"])


@given(sections(plain(RUN)).flatmap(json_files))
def test_any_stored_configuration_is_read_or_refused(place, content):
    path = place / "config.yaml"
    path.write_bytes(content)  # JSON is YAML, and is written much faster
    assert_reads_or_refuses(lambda: read_config(path), ConfigError)


BASED = plain(as_base(load("train", TrainConfig, ["hparam=none"])))
BASE = {"optimizer": BASED["optimizer"], "hparam": BASED["hparam"], "model": {"init": BASED["model"]["init"]}}


@given(json_files(BASE))
@example(json_bytes({**BASE, "hparam": ""}))
def test_any_base_of_a_transfer_is_read_or_refused(place, content):
    path = place / "base.yaml"
    path.write_bytes(content)

    def read() -> TrainConfig:
        merged = {**BASED, "model": dict(BASED["model"])}
        read_base(path, merged)
        return build(TrainConfig, merged)

    assert_reads_or_refuses(read, ConfigError)


@pytest.mark.parametrize("text", ["\\" * 100_000, "\\" * 100_000 + "x", "\\'" * 50_000, "$" * 100_000])
def test_quoting_a_long_text_takes_no_time(text):
    assert assert_reads_or_refuses(lambda: quoted(text), ConfigError)
