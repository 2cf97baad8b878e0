"""A filter of lines follows the seed, the tokenizer and what to do with unreadable lines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core.errors import ConfigError
from data.filter.config import FilterRules, InputConfig, KeepUnit, OnError
from data.filter.select.lines import LineFilter
from tests.support.filtering import FixedScorer, prose

TEXTS = [row["text"] for row in prose(64)]
LINES = [json.dumps({"text": text}).encode() for text in TEXTS]


def made(count_tokens: Any = None, **rules: Any) -> LineFilter:
    return LineFilter(InputConfig(input="-"), FilterRules(**rules), FixedScorer(lambda record: 1.0), count_tokens)


def kept(lines: list[bytes] = LINES, **rules: Any) -> list[bytes]:
    return made(**rules).kept(list(enumerate(lines, 1)))


def test_ties_follow_the_seed():
    by_seed = [kept(unit=KeepUnit.documents, seed=seed) for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1] != by_seed[2] and {len(one) for one in by_seed} == {32}


def test_tokens_are_those_of_the_tokenizer():
    for count_tokens, total in ((lambda texts: [3] * len(texts), 3 * 64), (None, sum(map(len, TEXTS)))):
        done = made(count_tokens)
        done.kept(list(enumerate(LINES, 1)))
        assert done.weight.total() == total


@pytest.mark.parametrize("on_error", OnError)
def test_unreadable_lines_follow_on_error(on_error):
    lines = [b"{broken", *LINES]
    if on_error is OnError.fail:
        with pytest.raises(ConfigError, match="-:1"):
            kept(lines, on_error=on_error)
    else:
        assert (lines[0] in kept(lines, on_error=on_error)) == (on_error is OnError.keep)


def test_the_tokens_of_a_prompt_count():
    rows = [{"q": "What is it? " * 9, "a": row["text"]} for row in prose(64)]
    config = InputConfig(input="-", prompt_key="q", response_key="a")
    for count_tokens in (None, lambda texts: [len(text.encode()) for text in texts]):
        done = LineFilter(config, FilterRules(), FixedScorer(lambda record: 1.0), count_tokens)
        done.kept([(number, json.dumps(row).encode()) for number, row in enumerate(rows, 1)])
        assert done.weight.total() >= sum(len(row["q"] + row["a"]) for row in rows)
