"""Overrides of the command line: text stays text, and what Hydra would stumble over is one clear error."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.config import build, load
from core.errors import ConfigError
from core.overrides import expand, parse, quoted

GROUPS = {"part": ["wide", "narrow"]}


@dataclass(frozen=True)
class Texts:
    text: str = "x"
    many: list[str] = field(default_factory=list)


@settings(max_examples=20)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
@example("${oc.env:HOME}")
@example(r"\${text}")
@example(r"\\${text}'\'${")
@example("it's a \\")
@example("a line that ends in \\\n")
def test_quoted_text_stays_text(text):
    assert load("texts", Texts, [f"text={quoted(text)}"]).text == text
    assert load("texts", Texts, [f"many=[{quoted(text)},y]"]).many == [text, "y"]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
@example("${oc.env:HOME}")
@example(r"\\\${text}")
def test_text_of_a_stored_configuration_is_not_interpolated(text):
    assert build(Texts, {"text": text, "many": [text]}) == Texts(text, [text])


def test_interpolation_on_the_command_line_still_works(monkeypatch):
    monkeypatch.setenv("WHERE", "here")
    assert load("texts", Texts, ["text=${oc.env:WHERE}/x"]).text == "here/x"


@pytest.mark.parametrize(
    "text", ["<s>", "part=0/x.jsonl", "~/x", "a]b", "50% & more", "f(x)", "x'y", "Hello, world", "é", "a;b", "=", "a#b"]
)
def test_what_hydra_cannot_parse_is_text(text):
    assert load("texts", Texts, [f"text={text}"]).text == text


REFUSED = {
    "=3": "'=3' is not KEY=VALUE",
    "key": "'key' is not KEY=VALUE",
    "a b=3": "'a b=3' is not KEY=VALUE",
    "a..b=3": "'a..b=3' is not KEY=VALUE",
    "hydra.run.dir=x": "hydra.run.dir: has no effect here",
    "a=[1": "a: cannot be parsed (no viable alternative at input '[1'); write text that begins with [ in quotes",
    "a='x": "a: cannot be parsed",
    "a=" + "[" * 3000: "a: cannot be parsed",
    "part=null": "part=null: must be the name of a preset; try wide or narrow",
    "part=5": "part=5: must be the name of a preset",
    "part=[wide]": "part=[wide]: must be the name of a preset",
    "a=interval(0,1)": "a=interval(0,1): has no definite values; list them",
    "a=glob(*)": "a=glob(*): has no definite values",
    "a=range(0,100000000)": "a: makes more than 10,000 runs",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_meant_is_refused(override):
    with pytest.raises(ConfigError) as caught:
        expand([override], GROUPS)
    assert str(caught.value).startswith(REFUSED[override])


def test_combinations_are_counted_before_they_are_made():
    assert len(expand(["a=range(0,100)", "b=range(0,100)"], GROUPS)) == 10_000
    with pytest.raises(ConfigError, match="b: makes more than 10,000 runs"):
        expand(["a=range(0,101)", "b=range(0,100)"], GROUPS)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_override_is_parsed_or_refused(text):
    try:
        override, _ = parse(text, GROUPS)
    except ConfigError:
        return
    assert parse(override, GROUPS)[0] == override
