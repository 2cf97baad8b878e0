"""Every key of every verb gets values that cannot be meant. Each is refused in one line that names the key, or kept.

The cases are made from the schemas, so that a new key is covered. The quick test takes every fortieth case, the slow one
all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import re
import typing
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from core.config import build, compose_plain, plain
from core.errors import ConfigError
from launch.cli import VERBS
from launch.config import LaunchConfig
from tests.launch.hostile.damage import wrong
from tests.support.verbs import GIVEN
from train.config import check

VALUES: dict[str, Any] = {
    "null": None,
    "empty": "",
    "word": "x",
    "unicode": "é😀\u202e",
    "long": "a" * 5000,
    "zero": 0,
    "negative": -1,
    "huge": 10**30,
    "most": 2**63 - 1,
    "fraction": 1.5,
    "nan": math.nan,
    "infinite": math.inf,
    "true": True,
    "list": [],
    "list of numbers": [1],
    "dict": {},
    "dict of numbers": {"a": 1},
    "interpolation": "${oc.env:HOME}",
    "above": "../../x",
    "nul": "a\0b",
}
IMPOSSIBLE = ("huge", "nan", "infinite", "nul")
"""Values that no key accepts."""


@cache
def schema_of(verb: str) -> type:
    if verb == "launch":
        return LaunchConfig
    entry = VERBS[verb]
    return typing.cast(type, getattr(importlib.import_module(f"launch.verbs.{entry.module or verb}"), entry.config))


@cache
def base(verb: str) -> dict[str, Any]:
    if verb == "launch":
        return typing.cast(dict[str, Any], plain(LaunchConfig()))
    return compose_plain(verb, schema_of(verb), GIVEN.get(verb, []))


def leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the keys of a component and of those inside it."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
        yield f"{prefix}{field.name}"


CASES = [(verb, key, name) for verb in (*VERBS, "launch") for key in leaves(schema_of(verb)) for name in VALUES]


def outcome(verb: str, key: str, name: str) -> str:
    """Return what is wrong with the way in which the case ends, or an empty text."""
    values = copy.deepcopy(base(verb))
    *parents, last = key.split(".")
    owner = values
    for parent in parents:
        owner = owner[parent]
    owner[last] = VALUES[name]
    try:
        config = build(schema_of(verb), values)
        if verb == "train":
            check(config, 1)
    except ConfigError as error:
        line = str(error)
        named = last in re.split(r"\W", line) or (parents and parents[-1] in re.split(r"\W", line))
        return "" if named and "\n" not in line and len(line) < 7000 else f"is refused without its key: {line[:200]}"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:200]}"
    kept: Any = config
    for part in (*parents, last):
        kept = getattr(kept, part)
    # a number is a possible text, and a huge one a possible real number
    possible = (isinstance(kept, str) and name != "nul") or (isinstance(kept, float) and math.isfinite(kept))
    return f"is accepted as {kept!r}" if name in IMPOSSIBLE and not possible else ""


def test_hostile_values_are_refused_in_one_line():
    chosen = [case for case in CASES if zlib.crc32("".join(case).encode()) % 40 == 0]
    assert len(chosen) > 150
    assert wrong((one, outcome(*one)) for one in chosen) == []


@pytest.mark.slow
def test_every_hostile_value_is_refused_in_one_line():
    assert len(CASES) > 1500
    assert wrong((one, outcome(*one)) for one in CASES) == []


def test_the_suite_notices_a_traceback_and_a_silent_acceptance(monkeypatch):
    def broken(config: Any, world_size: int) -> None:
        if config.training.steps == 2**63 - 1:
            raise OverflowError("too large")

    monkeypatch.setattr("tests.launch.hostile.test_keys.check", broken)
    monkeypatch.setattr("core.config._check_scalar", lambda value, path: None)
    assert outcome("train", "training.steps", "most") == "raises OverflowError: too large"
    assert outcome("train", "run.root", "nul") == "is accepted as 'a\\x00b'"
