"""How often answers are rejected, with verifiers that are right, wrong, broken or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.factory import make_scorer
from data.filter.score.pass_rate import PassRateScorer
from tests.support.llm_server import Pauses, Server, completion

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


@pytest.fixture(autouse=True)
def verifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_verifiers.py").write_text(VERIFIERS)
    (tmp_path / "broken_module.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)


def scorer(server: Server, cache: Path, verifier: str = "own_verifiers:is_right", samples: int = 4) -> PassRateScorer:
    config = ScorerConfig(
        ScorerKind.pass_rate, url=server.url, judge="m", verifier=verifier, samples=samples, retries=1, timeout_s=10
    )
    return PassRateScorer(config, cache, Pauses())


def task(prompt: str, answer: str) -> Record:
    return Record(f"id-{prompt}", "d", "s", prompt + answer, len(prompt))


TASKS = [task("always", "A"), task("half", "B"), task("never", "C")]


def by_seed(body: dict[str, Any], turn: int) -> Any:
    """Right always, every other time, and never; whoever is shown more than the prompt gets no answer."""
    prompt, seed = body["messages"][0]["content"], body["seed"]
    return completion({"always": "A", "half": "B" if seed % 2 else "?", "never": "?"}[prompt])


def test_the_score_is_the_share_that_is_rejected(server, tmp_path):
    server.reply = by_seed
    found = scorer(server, tmp_path / "cache").score(TASKS)
    assert found.tolist() == [0, 0.5, 1]
    assert all(request["temperature"] == 1 for request in server.requests)
    assert sorted(r["seed"] for r in server.requests) == sorted([0, 1, 2, 3] * 3)


def test_a_verifier_that_says_the_opposite_turns_it_round_without_asking_again(server, tmp_path):
    server.reply = by_seed
    scorer(server, tmp_path / "cache").score(TASKS)
    asked = len(server.requests)
    other = scorer(server, tmp_path / "cache", "own_verifiers:is_wrong")
    assert other.score(TASKS).tolist() == [1, 0.5, 0]
    assert len(server.requests) == asked == 12
    assert scorer(server, tmp_path / "cache", samples=5).score(TASKS[1:2]).tolist() == [3 / 5]
    assert len(server.requests) == 13, "only the fifth sample is new"


def test_numpy_booleans_count(server, tmp_path):
    server.reply = by_seed
    assert scorer(server, tmp_path / "cache", "own_verifiers:by_numpy").score(TASKS).tolist() == [0, 0, 0]


def test_what_a_verifier_cannot_judge_has_no_score_but_a_reason(server, tmp_path):
    server.reply = lambda body, turn: completion(body["messages"][0]["content"])
    raising = scorer(server, tmp_path / "a", "own_verifiers:raises")
    found = raising.score([task("3", "x"), task("4", "x"), task("5", "x")])
    assert np.isnan(found).tolist() == [False, True, False] and found[0] == 0
    assert raising.reasons == {"id-4": "the verifier raised KeyError: 'no such thing'"}
    vague = scorer(server, tmp_path / "a", "own_verifiers:returns_text")
    assert np.isnan(vague.score([task("3", "x")])).all() and "returned str, not bool" in vague.reasons["id-3"]


def test_documents_and_lost_answers_have_no_score(server, tmp_path):

    def reply(body: dict[str, Any], turn: int) -> Any:
        return (400, {}, b"too long") if body["messages"][0]["content"] == "never" else by_seed(body, turn)

    server.reply = reply
    found = scorer(server, tmp_path / "cache")
    scores = found.score([*TASKS, Record("doc", "d", "s", "plain")])
    assert np.isnan(scores).tolist() == [False, False, True, True]
    assert found.reasons["doc"] == "no prompt to answer" and "too long" in found.reasons["id-never"]


@pytest.mark.parametrize(
    ("verifier", "said"),
    [
        ("own_verifiers", "not of the form module:function"),
        (":is_right", "not of the form"),
        ("own_verifiers:", "not of the form"),
        ("no_such_module:f", "cannot be imported .*no_such_module.*PYTHONPATH"),
        ("broken_module:f", "cannot be imported .*no_such_module_at_all"),
        ("own_verifiers:is_rihgt", "no such function; try own_verifiers:is_right"),
        ("own_verifiers:number", "no such function"),
    ],
)
def test_a_verifier_that_is_none_is_refused_before_anything_is_asked(server, tmp_path, verifier, said):
    config = ScorerConfig(ScorerKind.pass_rate, url=server.url, judge="m", verifier=verifier)
    with pytest.raises(ConfigError, match=said):
        make_scorer(config, None, tmp_path / "cache")
    assert server.requests == []


def test_another_verifier_file_is_another_fingerprint(server, tmp_path):
    import sys

    before = scorer(server, tmp_path / "cache").fingerprint
    assert scorer(server, tmp_path / "cache").fingerprint == before
    (tmp_path / "own_verifiers.py").write_text(VERIFIERS + "# changed\n")
    sys.modules.pop("own_verifiers")
    assert scorer(server, tmp_path / "cache").fingerprint != before
