"""A filter of lines follows the seed, the tokenizer and what to do with unreadable lines."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError
from data.filter.config import ContaminationConfig, FilterRules, InputConfig, KeepUnit, OnError, SelectConfig
from data.filter.input.records import Reason, Record
from data.filter.select.lines import LineFilter
from data.filter.select.selection import REASONS, ShardScores
from data.filter.select.streaming import StreamSelector
from data.sampling import key_of
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


@pytest.mark.parametrize("unit", KeepUnit)
def test_each_domain_is_decided_by_its_own_selector(unit, tmp_path):
    """Lines are decided as one selector for each domain decides on batches of its own lines."""
    (tmp_path / "exam.txt").write_text(TEXTS[4])
    clean = [Record("clean", "all", "clean", text) for text in TEXTS[:20]]
    score_of = {text: float(place % 20 % 5 if place < 20 else place % 6) for place, text in enumerate(TEXTS)}
    config = InputConfig(input="-", domain_key="d")
    select = SelectConfig(domains={"a": 0.2}, noise_quantile=0.99, revive=0.3)
    sets = ContaminationConfig({"exam": str(tmp_path / "exam.txt")})
    rules = FilterRules(keep=0.6, unit=unit, select=select, contamination=sets, seed=3)
    scorer = FixedScorer(lambda record: score_of[record.text])
    done = LineFilter(config, rules, scorer, None, clean)
    rows = [{"text": text, "d": "ab"[place % 3 == 0]} for place, text in enumerate([*TEXTS, *TEXTS[:30]])]
    lines = [json.dumps(row).encode() for row in rows]
    selectors = {name: StreamSelector(name, rules, 4.0) for name in "ab"}
    wanted, weights = [], []
    for begin in range(0, len(rows), 40):
        reasons = {}
        for name in "ab":
            mine = [
                n
                for n in range(begin, min(begin + 40, len(rows)))
                if rows[n]["d"] == name and rows[n]["text"] != TEXTS[4]
            ]
            length = np.array([len(rows[n]["text"]) for n in mine])
            weight = length if unit is KeepUnit.tokens else length * 0 + 1
            ties = np.array([key_of(3, f"-:{n + 1}") for n in mine], np.uint64)
            score = np.array([score_of[rows[n]["text"]] for n in mine])
            codes = selectors[name].decide(ShardScores("", score, length * 0, length, weight, ties))
            reasons |= {n: REASONS[code] for n, code in zip(mine, codes, strict=True)}
            weights += [(REASONS[code].kept, int(size)) for code, size in zip(codes, weight, strict=True)]
        batch = range(begin, min(begin + 40, len(rows)))
        wanted += [reasons.get(n, Reason.contaminated) for n in batch]
        kept_lines = [lines[n] for n in batch if reasons.get(n, Reason.contaminated).kept]
        assert done.kept([(n + 1, lines[n]) for n in batch]) == kept_lines
    counts = done.counts()
    assert counts["reasons"] == {reason.name: wanted.count(reason) for reason in Reason if reason in wanted}
    assert set(counts["reasons"]) == {"hard", "easy", "revived", "noise", "contaminated"}
    assert (counts["lines"], counts["kept"]) == (94, sum(reason.kept for reason in wanted))
    kept_weight, whole = (sum(size for kept, size in weights if kept or every) for every in (False, True))
    assert counts["rate"] == kept_weight / whole and counts["unit"] == unit.name


def test_lines_are_screened_as_whole_records(tmp_path):
    """The evaluation set is in the prompt, and one answer alone is broken."""
    (tmp_path / "exam.txt").write_text(TEXTS[0])
    config = InputConfig(input="-", prompt_key="q", response_key="a")
    rules = FilterRules(keep=1.0, contamination=ContaminationConfig({"exam": str(tmp_path / "exam.txt")}))
    done = LineFilter(config, rules, FixedScorer(lambda record: 1.0))
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[0]), (TEXTS[3], TEXTS[4]), (TEXTS[5], "ab " * 99), (TEXTS[6], " ")]
    done.kept([(n, json.dumps({"q": q, "a": a}).encode()) for n, (q, a) in enumerate(pairs, 1)])
    reasons = {Reason.contaminated: 2, Reason.hard: 1, Reason.repetitive: 1, Reason.empty: 1}
    assert done.reasons == reasons


def test_empty_lines_have_numbers_and_the_check_comes_once(tmp_path):
    seen = []
    done = LineFilter(InputConfig(input="-"), FilterRules(), FixedScorer(lambda record: 1.0), check=seen.append)
    done.run([b"\n", LINES[0] + b"\r\n", b" \n", *(line + b"\n" for line in LINES)], tmp_path)
    (first,) = seen
    assert [record.id for record in first[:2]] == ["-:2", "-:4"] and len(first) == 64
    assert set((tmp_path / "kept.jsonl").read_bytes().splitlines()) <= set(LINES)
