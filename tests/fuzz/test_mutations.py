"""What the fuzz tests demand of a parser: each way to break it is noticed."""

from __future__ import annotations

import json

import pytest
from hypothesis import Phase, find, settings

from core.errors import CheckpointError, ConfigError, DataError
from tests.fuzz import mutations
from tests.fuzz.mutations import Endless, assert_reads_or_refuses, damaged, json_bytes, spoiled

QUICK = settings(max_examples=5000, database=None, derandomize=True, phases=[Phase.generate])
TREE = {"a": [1, {"b": "x"}], "c": None}


def fails(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("kind", [DataError, CheckpointError, lambda text: ConfigError("key", text, text)])
def test_errors_of_ours_are_one_printable_line(kind):
    assert (
        assert_reads_or_refuses(
            lambda: fails(kind("a\nb\x1b[2J\ud800\u202e" + "x" * 10**6)), DataError, CheckpointError, ConfigError
        )
        is None
    )


def test_other_errors_and_messages_are_failures():
    with pytest.raises(KeyError):
        assert_reads_or_refuses(lambda: fails(KeyError("a")), DataError)
    for message in ("a\nb", "\x1b[2J", "\ud800", "x" * 10_000, ""):
        with pytest.raises(AssertionError):
            assert_reads_or_refuses(lambda message=message: fails(ValueError(message)), ValueError)


def spin() -> None:
    while True:
        pass


def test_an_endless_loop_and_much_memory_are_failures(monkeypatch):
    monkeypatch.setattr(mutations, "LONGEST_S", 0.5)
    with pytest.raises(Endless):
        assert_reads_or_refuses(spin)
    sizes = iter([100 << 10, 700 << 10])
    monkeypatch.setattr(mutations.resource, "getrusage", lambda _: type("Usage", (), {"ru_maxrss": next(sizes)}))
    with pytest.raises(AssertionError, match="600 MiB"):
        assert_reads_or_refuses(lambda: None)


WANTED = {
    "a value is replaced": lambda tree: isinstance(tree, dict) and tree.get("c", 0) not in (None, 0),
    "a key is removed": lambda tree: isinstance(tree, dict) and "c" not in tree and len(tree) < 2,
    "a value is doubled": lambda tree: isinstance(tree, dict) and tree.get("a") == [1, 1, {"b": "x"}],
    "all is replaced": lambda tree: not isinstance(tree, dict),
}


@pytest.mark.parametrize("name", WANTED)
def test_trees_are_spoiled_in_every_way(name):
    assert WANTED[name](find(spoiled(TREE), WANTED[name], settings=QUICK)), "find raises if there is no such tree"


def test_damage_leaves_files_that_parse_and_others():
    def parses(content: bytes) -> bool:
        try:
            return json.loads(content) != TREE
        except (ValueError, RecursionError):
            return False

    assert parses(find(damaged(json_bytes(TREE)), parses, settings=QUICK))
    assert not parses(find(damaged(json_bytes(TREE)), lambda content: not parses(content), settings=QUICK))
