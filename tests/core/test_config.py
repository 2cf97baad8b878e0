"""Typed configuration: valid values make typed objects, and others are refused with the key and the fix."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

import core.config
from core.config import build, differences, load
from core.errors import ConfigError


class Kind(Enum):
    first = "first"
    second = "second"


@dataclass(frozen=True)
class Part:
    width: int = 8
    kind: Kind = Kind.first
    limit: int | None = None
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.width % 8:
            raise ConfigError("width", self.width, "must be a multiple of 8", [8, 16])


@dataclass(frozen=True)
class Root:
    part: Part = field(default_factory=Part)
    named: dict[str, Part] = field(default_factory=lambda: {"given": Part()})
    listed: list[Part] = field(default_factory=list)
    extra: Part | None = None


@dataclass(frozen=True)
class Named:
    label: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class Wide:
    part: Part = Part(64, Kind.second, sizes=[3])
    same: Part = field(default_factory=Part)


@pytest.fixture
def configs(tmp_path, monkeypatch) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "root.yaml").write_text("defaults:\n  - root_schema\n  - part: wide\n  - _self_\n")
    (tmp_path / "part" / "wide.yaml").write_text("width: 16\nkind: second\n")
    monkeypatch.setattr(core.config, "config_directory", lambda: tmp_path)
    return tmp_path


def test_yaml_overrides_and_defaults_make_typed_objects(configs):
    overrides = ["part.limit=3", "+named.mine.width=24", "listed=[{sizes: [1, 2]}]"]
    config = load("root", Root, [*overrides, "extra={width: 32}"])
    assert config.part == Part(16, Kind.second, 3)
    assert config.named == {"given": Part(), "mine": Part(24)}
    assert config.listed == [Part(sizes=[1, 2])]
    assert config.extra == load("root", Root, ["+extra.width=32"]).extra == Part(32)


def test_a_components_own_defaults_are_kept():
    """The field `part` has other defaults than its class. What is given replaces one of them."""
    assert build(Wide, {}) == Wide()
    assert build(Wide, {"part": {"limit": 7}}) == Wide(Part(64, Kind.second, 7, [3]))
    assert build(Wide, {"part": {"width": 16, "kind": "first"}}).part == Part(16, sizes=[3])
    assert build(Wide, {}).same == Part() != build(Wide, {}).part, "control"


@pytest.mark.parametrize(
    "override, message",
    {
        "part.widht=8": "part.widht: no such key; try part.width",
        "+part.colour=8": "part.colour: no such key; try part.width, part.kind, part.limit or part.sizes",
        "part.width=9": "part.width=9: must be a multiple of 8; try 8 or 16",
        "part.width=wide": "part.width=wide: Value 'wide' of type 'str' could not be converted to Integer",
        "part.kind=third": "part.kind=third: Invalid value 'third', expected one of [first, second]",
        "part=narrow": "part=narrow: no such choice; try wide",
        "other=1": "other: no such key; try part, named, listed or extra",
        "named.mine.width=8": "named.mine: no such entry; try +named.mine=... to add one",
        "+named.mine.widht=8": "named.mine.widht: no such key; try named.mine.width",
        "+named.mine.width=9": "named.mine.width=9: must be a multiple of 8; try 8 or 16",
        "extra={widht: 8}": "extra.widht: no such key; try extra.width",
        "extra={width: 9}": "extra.width=9: must be a multiple of 8; try 8 or 16",
        "extra=3": "extra=3: needs keys and values, not one value",
        "extra.width=8": "extra.width: is unset by default; try +extra.width=... to set it",
        "listed=[{width: 9}]": "listed.0.width=9: must be a multiple of 8; try 8 or 16",
        "part.width": "'part.width' is not KEY=VALUE; keys are written as in model.hidden_size=256",
    }.items(),
)
def test_refusals_name_the_key_and_the_fix(configs, override, message):
    with pytest.raises(ConfigError) as caught:
        load("root", Root, [override])
    assert str(caught.value) == message


def test_broken_files_are_refused_too(configs):
    (configs / "part" / "wide.yaml").write_text("witdh: 16\n")
    with pytest.raises(ConfigError, match=r"part\.witdh: no such key; try part\.width"):
        load("root", Root, [])


@pytest.mark.parametrize("value", ["a\0", "\ud800\udc00", "\udc80"])
def test_text_that_no_file_can_hold_is_refused(value):
    with pytest.raises(ConfigError, match=r"^label(=| |:)"):
        build(Named, {"label": value})


def test_a_whole_number_beyond_floats_is_refused():
    with pytest.raises(ConfigError, match=r"^share: must be at most"):
        build(Named, {"share": 10**400})
    for value in (str(10**400), f"[1,{{a: {10**400}}}]"):
        with pytest.raises(ConfigError, match=r"^share: must be at most"):
            load("named", Named, [f"share={value}"])


def test_differences_name_leaves():
    old, new = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [1, 2], "e": 5}
    assert differences(old, new) == {"a.c": (2, 3), "d": ([1], [1, 2]), "e": (None, 5)}
    assert differences(old, old) == {}
