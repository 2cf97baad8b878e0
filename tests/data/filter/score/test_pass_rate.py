"""Test pass rates with verifiers that are right, wrong, broken or absent."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.factory import make_scorer
from data.filter.score.pass_rate import PassRateScorer
from tests.support.fakes.llm_server import Pauses, completion

VERIFIERS = """
import numpy
def is_right(record, answer): return answer == record.answer
def is_wrong(record, answer): return answer != record.answer
def by_numpy(record, answer): return numpy.equal(len(answer), len(record.answer))
def raises(record, answer):
    if answer == "4": raise KeyError("no such thing")
    return True
def returns_text(record, answer): return "False"
number = 3
"""


@pytest.fixture
def scorer(server, tmp_path, monkeypatch):
    """Return `scorer(verifier, samples)`. Its server solves the three `TASKS` always, every other time, and never."""
    (tmp_path / "own_verifiers.py").write_text(VERIFIERS)
    (tmp_path / "broken_module.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    server.reply = by_seed

    def made(verifier: str = "is_right", samples: int = 4) -> PassRateScorer:
        settings = {"url": server.url, "judge": "m", "verifier": f"own_verifiers:{verifier}", "samples": samples}
        config = ScorerConfig(ScorerKind.pass_rate, retries=1, timeout_s=10, **settings)
        return PassRateScorer(config, Pauses())

    return made


def task(prompt: str, answer: str) -> Record:
    return Record(f"id-{prompt}", "d", "s", prompt + answer, len(prompt))


TASKS = [task("always", "A"), task("half", "B"), task("never", "C")]


def by_seed(body: dict[str, Any], turn: int) -> Any:
    """Answer the prompts of `TASKS`. Any other prompt, such as one with more text in it, raises KeyError."""
    prompt, seed = body["messages"][0]["content"], body["seed"]
    return completion({"always": "A", "half": "B" if seed % 2 else "?", "never": "?"}[prompt])


def test_the_score_is_the_rejected_share(server, scorer):
    assert scorer().score(TASKS).tolist() == [0, 0.5, 1]
    assert all(request["temperature"] == 1 for request in server.requests)
    assert sorted(r["seed"] for r in server.requests) == sorted([0, 1, 2, 3] * 3)
    assert scorer("is_wrong").score(TASKS).tolist() == [1, 0.5, 0], "the opposite verdict"
    assert scorer("by_numpy").score(TASKS).tolist() == [0, 0, 0], "booleans of numpy count"
    assert len(server.requests) == 12, "another verifier costs no request"
    assert scorer(samples=5).score(TASKS[1:2]).tolist() == [3 / 5]
    assert len(server.requests) == 13, "only the fifth sample is new"
    first, other = scorer(), scorer()
    other.model = "other"
    assert not first.requests(TASKS[0]).keys() & other.requests(TASKS[0]).keys()


def test_without_a_verdict_there_is_no_score_but_a_reason(server, scorer):
    server.reply = lambda body, turn: completion(body["messages"][0]["content"])
    raising = scorer("raises")
    found = raising.score([task("3", "x"), task("4", "x"), task("5", "x")])
    assert np.isnan(found).tolist() == [False, True, False] and found[0] == 0
    assert raising.reasons == {"id-4": "the verifier raised KeyError: 'no such thing'"}
    vague = scorer("returns_text")
    assert np.isnan(vague.score([task("3", "x")])).all() and "returned str, not bool" in vague.reasons["id-3"]


def test_documents_and_missing_answers_have_no_score(server, scorer):
    too_long = (400, {}, b"too long")
    server.reply = lambda body, turn: too_long if "never" in body["messages"][0]["content"] else by_seed(body, turn)
    found = scorer()
    scores = found.score([*TASKS, Record("doc", "d", "s", "plain")])
    assert np.isnan(scores).tolist() == [False, False, True, True]
    assert found.reasons["doc"] == "no prompt to answer" and "too long" in found.reasons["id-never"]


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("own_verifiers", "must be an import path, module:Name"),
        (":is_right", "must be an import path"),
        ("no_such_module:f", "no module 'no_such_module': .*PYTHONPATH"),
        ("broken_module:f", "cannot be imported: .*no_such_module_at_all"),
        ("own_verifiers:is_rihgt", "own_verifiers has no is_rihgt; try own_verifiers:is_right"),
        ("own_verifiers:number", "must be a class or a function, not a int"),
    ],
)
def test_an_invalid_verifier_is_rejected_before_any_request(server, scorer, tmp_path, verifier, message):
    config = ScorerConfig(ScorerKind.pass_rate, url=server.url, judge="m", verifier=verifier)
    with pytest.raises(ConfigError, match=message):
        make_scorer(config, None, tmp_path)
    assert server.requests == []


def test_a_changed_verifier_changes_the_fingerprint(scorer, tmp_path):
    before = scorer().fingerprint
    assert scorer().fingerprint == before
    (tmp_path / "own_verifiers.py").write_text(VERIFIERS + "# changed\n")
    sys.modules.pop("own_verifiers")
    assert scorer().fingerprint != before
