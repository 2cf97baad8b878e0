"""Answers of judges and models, the cache of answers, what a server sends, what a verifier returns, and the answers and
files of examinations.
"""

from __future__ import annotations

from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import ConfigError, LeviathanError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.answers import AnswerCache
from data.filter.score.endpoint import LONGEST_RETRY_AFTER_S, Endpoint, UnusableAnswer, _retry_after_s
from data.filter.score.judge import JudgeScorer, parse_grade
from data.filter.score.pass_rate import PassRateScorer
from tests.fuzz.mutations import assert_reads_or_refuses, files, hostile, json_bytes, json_files
from train.exam.answers_text import UnreadableAnswer, read_number, read_roots, read_system
from train.exam.base import Verdict
from train.exam.knowledge import FactChoices, FactLists, MultipleChoice, ShortLists
from train.exam.mathematics import LinearSystems, Quadratics, WordProblems
from train.exam.pictures import SceneQuestions

RECORD = Record("1", "all", "a:1", "prompt answer", 7)
ANSWER = {"choices": [{"index": 0, "message": {"role": "assistant", "content": '{"grade": 3}'}}]}
URL = "http://localhost:1/v1"
ENDPOINT = Endpoint(URL, "m", "NO_SUCH_KEY")


@given(json_files({"grade": 3}))
def test_any_answer_of_a_judge_is_a_grade_or_unusable(content):
    found = assert_reads_or_refuses(lambda: parse_grade(content.decode(errors="replace")), UnusableAnswer)
    assert found is None or (type(found) is int and 1 <= found <= 5)


@example(b"\0\x1b", 404)
@given(json_files(ANSWER), st.sampled_from([200, 200, 200, 400, 401, 404, 422]))
def test_any_response_is_text_or_unusable(content, status):
    found = assert_reads_or_refuses(lambda: ENDPOINT._content(status, content), *ANSWERED)
    assert found is None or isinstance(found, str)


ANSWERED = (UnusableAnswer, LeviathanError, httpx.DecodingError)
DATES = [b"120", b"1.5", b"Fri, 31 Dec 1999 23:59:59 GMT", b"31 Dec 99999 23:59:59 -9999"]


@given(st.sampled_from(DATES).flatmap(files))
def test_any_retry_after_is_a_wait_or_ignored(content):
    response = Mock(headers=httpx.Headers([(b"Retry-After", content)]))
    found = assert_reads_or_refuses(lambda: _retry_after_s(response))
    assert found is None or 0 <= found <= LONGEST_RETRY_AFTER_S


JUDGE = JudgeScorer(ScorerConfig(kind=ScorerKind.judge, url=URL, judge="m", retries=0))
JUDGE.endpoint.endpoint.complete = lambda *_, **__: '{"grade": 4}'


KEY = next(iter(JUDGE.requests(RECORD)))


@given(json_files({"key": KEY, "answer": '{"grade": 3}'}))
@example(json_bytes({"key": KEY, "answer": {}}))
@example(json_bytes({"key": KEY, "answer": '{"grade": 9}'}))
@example(b"[" * 100_000)
def test_any_cached_answer_is_a_score_or_asked_again(place, content):
    path = place / "answers.jsonl"
    path.write_bytes(content + b"\n")

    def again() -> NDArray[np.float64]:
        JUDGE.endpoint.cache = AnswerCache(path)
        return JUDGE.score([RECORD])

    score = assert_reads_or_refuses(again)
    assert score is not None and score[0] in (1, 2, 3, 4, 5)


PASS_RATE = ScorerConfig(kind=ScorerKind.pass_rate, url=URL, judge="m", verifier=f"{__name__}:verify", samples=1)


@pytest.fixture(scope="module")
def pass_rate(place):
    return PassRateScorer(PASS_RATE)


def verify(record: Record, answer: str) -> object:
    return VERDICTS.pop()


VERDICTS: list[object] = []


@given(hostile() | st.just(np.True_))
def test_any_verdict_is_a_score_or_unusable(pass_rate, verdict):
    VERDICTS[:] = [verdict]
    found = assert_reads_or_refuses(lambda: pass_rate.score_from(RECORD, ["b"]), UnusableAnswer)
    assert found in (None, 0, 1)


EXAM_ANSWERS = [
    *(
        b"infinitely many: x = 1 - t/2, y = 3(t - 1), z = -2.5",
        b"The answer is (1, 0, 2) + s(-1, 1/3, 0)",
        b"no solution",
    ),
    *(
        b"x1 = 2 or x_2 = 1 \xc2\xb1 3",
        b"$x \\in \\{\\frac{1}{2}, -3\\}$",
        b"1,200 + 3 = twelve",
        b"1. Mars\n2. the Earth",
    ),
]
EXAMS = [LinearSystems(3), Quadratics(3), WordProblems(2), FactLists(1), FactChoices(1), SceneQuestions(1)]


@example(b"x = 1/0")
@example("x = ½²".encode())
@given(st.sampled_from(EXAM_ANSWERS).flatmap(files))
def test_any_answer_is_judged_or_unreadable(content):
    text = content.decode(errors="replace")
    for read in (lambda: read_system(text, ("x", "y", "z")), lambda: read_roots(text), lambda: read_number(text)):
        assert_reads_or_refuses(read, UnreadableAnswer)
    for exam in EXAMS:
        for question in exam.questions():
            assert isinstance(assert_reads_or_refuses(lambda e=exam, q=question: e.judge(q, text)), Verdict)


CHOICE = {"id": "1", "question": "Which?", "choices": ["Rome", "Paris"], "answer": 1}
LIST = {"question": "Which?", "items": ["Rome", ["Paris", "Lutetia"]], "optional": ["Bonn"]}


@pytest.mark.parametrize("kind, record", [(MultipleChoice, CHOICE), (ShortLists, LIST)], ids=["choices", "lists"])
@given(data=st.data())
def test_any_file_of_questions_is_read_or_refused(place, kind, record, data):
    path = place / "questions.jsonl"
    path.write_bytes(data.draw(json_files(record)))
    assert_reads_or_refuses(lambda: kind(str(path)).questions(), ConfigError)
