"""YAML from a stranger: everything that a configuration does not need is refused, with the place."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UnreadableFileError
from core.files import read_json, read_text
from core.yaml_file import read_yaml

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))
REFUSED = {
    "a: [1": "line 1, column 6: expected ',' or ']'",
    "a: 1\nb:\n\tc: 2": "line 3, column 1: found character '\\t'",
    "a: {b: 1, c: 2, b: 3}": "line 1, column 17: names the key 'b' twice",
    "a: &x {b: *x}": "is nested too deeply, or contains itself",
    "[" * 5000: "is nested too deeply",
    "a: " + "[" * 70 + "]" * 70: "is nested too deeply, or contains itself",
    BOMB: "has more than 1,000,000 values",
    "a: !!python/object/apply:os.system [true]": "could not determine a constructor",
    "a: !!binary aGk=": "is a bytes: write it in quotes",
    "when: 2026-11-29": "the value 2026-11-29 is a date: write it in quotes",
    "when: 2026-02-31": "day is out of range for month",
    "1: x": "the key 1 must be text",
    "a: " + "9" * 5000: "Exceeds the limit",
    "a: \0": "special characters are not allowed",
}


@pytest.mark.parametrize("content", REFUSED)
def test_yaml_that_no_configuration_needs_is_refused(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(UnreadableFileError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ") and REFUSED[content] in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_what_we_write_is_read(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(yaml.safe_dump(value))
    assert read_yaml(path) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    for read in (read_yaml, read_json, read_text):
        try:
            read(path)
        except UnreadableFileError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_what_is_not_a_file_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder")):
        with pytest.raises(UnreadableFileError, match=f"is {what}, but must be a file"):
            read_yaml(path)


def test_sizes_are_limited(tmp_path):
    path = tmp_path / "large"
    path.write_text("x" * 2**20)
    assert len(read_text(path, 2**20)) == 2**20
    with pytest.raises(UnreadableFileError, match="is larger than 1 MiB"):
        path.write_text("x" * (2**20 + 1))
        read_text(path, 2**20)
