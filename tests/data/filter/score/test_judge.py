"""Test the judge against a local server that is slow, busy or broken, or that answers nonsense."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError, LeviathanError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.answers import AnswerCache
from data.filter.score.endpoint import Endpoint, UnusableAnswer
from data.filter.score.judge import JudgeScorer, parse_grade, shortened
from data.filter.score.scorer import Direction
from tests.support.fakes.llm_server import KEY, Pauses, Reply, completion, graded


@pytest.fixture
def judge(server, tmp_path):
    """Return `judge(folder, pauses, **settings)`, which makes a judge that asks `server` and caches in `folder`."""

    def made(folder: str = "", pauses: Pauses | None = None, real_pauses: bool = False, **more: Any) -> JudgeScorer:
        settings = {"url": server.url, "judge": "grader", "key_variable": "JUDGE_KEY", "timeout_s": 10.0, **more}
        pause = None if real_pauses else Pauses() if pauses is None else pauses
        return JudgeScorer(ScorerConfig(ScorerKind.judge, answers=str(tmp_path / folder), **settings), pause)

    return made


def prompts(*texts: str) -> list[Record]:
    return [Record(f"id-{text}", "d", "s", f"{text} ANSWER", len(text)) for text in texts]


def numbered(count: int) -> list[Record]:
    return prompts(*(f"question number {i};" for i in range(count)))


def number_of(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"].rsplit("question number ", 1)[1].split(";")[0])


def by_number(body: dict[str, Any], turn: int) -> Reply:
    return graded(1 + number_of(body) % 5)


def test_each_record_gets_its_own_grade_in_order(server, judge):
    server.reply, server.latency_s = by_number, 0.02
    scorer = judge(concurrency=3)
    assert scorer.score(numbered(12)).tolist() == [1 + i % 5 for i in range(12)] and scorer.reasons == {}
    sent = server.requests[0]
    assert sent["path"] == "/v1/chat/completions" and sent["model"] == "grader" and sent["temperature"] == 0
    assert sent["response_format"] == {"type": "json_object"}
    assert server.headers[0]["Content-Type"] == "application/json"
    assert server.most_at_once == 3, "as many requests at once as allowed"


def test_the_rubric_decides_what_is_shown(server, judge, tmp_path):
    """A rubric of the user's shows what its placeholder says, and asks for the same form. A text may hold braces."""
    records = [*prompts("why?"), Record("doc", "d", "s", "plain {text} {prompt} text")]
    own = tmp_path / "own.txt"
    own.write_text('Rate {"this": {prompt}}')
    graded_of = {}
    for rubric in ("difficulty", "quality", str(own)):
        server.requests.clear()
        scorer = judge(rubric=rubric)
        graded_of[rubric] = scorer.score(records).tolist(), scorer.reasons.get("doc")
        shown = [request["messages"][0]["content"] for request in server.requests]
        assert all('{"grade": N}' in one for one in shown) and len(shown) == 1 + (rubric == "quality")
        assert any("why?" in one for one in shown) and any("ANSWER" in one for one in shown) == (rubric == "quality")
        assert any("plain {text} {prompt} text" in one for one in shown) == (rubric == "quality")
    assert shown == ['Rate {"this": why?}\n\n' + shown[0].partition("\n\n")[2]]
    assert np.isnan(graded_of["difficulty"][0][1]) and "scorer.rubric=quality" in graded_of["difficulty"][1]
    assert graded_of["quality"] == ([3, 3], None)


def test_what_a_high_score_means_follows_the_rubric(judge, tmp_path):
    own = tmp_path / "own.txt"
    found = []
    for content in ("Rate {text}", "Grade {text}"):
        own.write_text(content)
        found.append(judge(rubric=str(own)))
    hard, quality = judge(), judge(rubric="quality")
    assert hard.direction is Direction.hard and hard.measures == "difficulty of the prompt by the judge, 1 to 5"
    assert quality.direction is Direction.quality and quality.measures == "quality of the text by the judge, 1 to 5"
    assert found[0].direction is Direction.quality and found[0].measures == "grade of the text by the judge, 1 to 5"
    assert len({one.fingerprint for one in (hard, quality, *found)}) == 4


@pytest.mark.parametrize("content", [None, b"Rate it", b"{text} {prompt}", b"\xff{text}"])
def test_a_rubric_without_a_place_for_the_record_is_rejected(judge, tmp_path, content):
    if content is not None:
        (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^rubric=.*own\.txt") as caught:
        judge(rubric=str(tmp_path / "own.txt"))
    assert "{prompt} or {text}" in str(caught.value) or "cannot be read" in str(caught.value)


def test_cached_answers_are_not_requested_again(server, judge):
    records, server.reply = numbered(6), by_number
    first = judge().score(records)
    server.reply = lambda body, turn: graded(5)
    assert judge().score([*records, *records[:2]]).tolist() == [*first, *first[:2]]
    assert len(server.requests) == 6
    assert judge(judge="another").score(records).tolist() == [5] * 6, "another judge has other answers"
    assert judge("elsewhere").score(records[:1]).tolist() == [5], "control: an empty cache"
    server.requests.clear()
    assert judge().score(prompts("same", "same", "same")).tolist() == [5, 5, 5] and len(server.requests) == 1


def test_a_killed_run_keeps_its_answers(server, judge, tmp_path):
    """The endpoint fails after five answers. The incomplete line that a kill leaves in the cache is skipped."""
    server.reply = lambda body, turn: graded(4) if number_of(body) < 5 else (503, {}, b"")
    with pytest.raises(LeviathanError):
        judge(concurrency=1, retries=0).score(numbered(40))
    file = next(tmp_path.glob("*.jsonl"))
    file.write_text(file.read_text() + '{"key": "ab')
    server.requests.clear()
    server.reply = lambda body, turn: graded(2)
    assert judge().score(numbered(7)).tolist() == [4] * 5 + [2] * 2 and len(server.requests) == 2


def test_the_key_is_sent_and_kept_nowhere(server, judge, tmp_path, caplog, capsys):
    """The key is kept nowhere, even if the server repeats it in an error."""
    echo = {"choices": [{"message": {"content": f"Bearer {KEY}"}}]}
    server.reply = lambda body, turn: graded(3) if number_of(body) else (400, {}, json.dumps(echo).encode())
    caplog.set_level(0)
    scorer = judge()
    scorer.score(numbered(3))
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    cached = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    output = capsys.readouterr()
    printed = f"{scorer.reasons} {caplog.text} {output.out} {output.err} {scorer.fingerprint}"
    assert "difficulty" not in cached and cached.count("\n") == 2
    assert KEY not in cached + printed and "[key]" in str(scorer.reasons)


def test_without_a_key_none_is_sent(server, judge, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    judge().score(numbered(1))
    assert "Authorization" not in server.headers[0]
    server.reply = lambda body, turn: (401, {}, b"")
    with pytest.raises(LeviathanError, match="requires a key: set JUDGE_KEY"):
        judge("b").score(numbered(1))


@pytest.mark.parametrize(("status", "message"), [(401, "rejects the key in JUDGE_KEY"), (404, "no model 'grader'")])
def test_errors_that_no_retry_fixes_stop_at_once(server, judge, status, message):
    server.reply = lambda body, turn: (status, {}, f"who is {KEY}?".encode())
    with pytest.raises(LeviathanError, match=message) as caught:
        judge(pauses=(pauses := Pauses()), concurrency=1).score(numbered(3))
    assert pauses == [] and KEY not in str(caught.value)


def test_only_passing_failures_are_repeated(server, judge):
    for status in (408, 425, 429, 500, 503, 599, 400, 402, 409, 422, 499, 302):
        server.requests.clear()
        server.reply = lambda body, turn, status=status: graded(4) if len(server.requests) > 1 else (status, {}, b"")
        scorer = judge(str(status), concurrency=1)
        is_repeated = status in (408, 425, 429) or status >= 500
        assert np.isfinite(scorer.score(numbered(1))).all() == is_repeated == (len(server.requests) == 2), status


def test_retry_after_is_a_number_or_a_date(server, judge):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    headers = ["7", later, "soon", "-5", "99999999", "nan"]
    server.reply = lambda body, turn: (429, {"Retry-After": headers[turn]}, b"") if turn < len(headers) else graded(1)
    pauses = Pauses()
    assert judge(pauses=pauses, retries=6).score(numbered(1)).tolist() == [1]
    number, date, soon, negative, largest, nan = pauses
    assert number == 7 and 25 < date <= 30 and largest == 600
    assert 2 <= soon <= 4 and 4 <= negative <= 8 and 16 <= nan <= 32, "an unreadable value gives the usual backoff"


def test_backoff_grows_to_a_limit_and_is_the_same_each_time(server, judge):
    server.reply = lambda body, turn: graded(5) if turn % 11 == 10 else (500, {}, b"oops")
    pauses, again = Pauses(), Pauses()
    for folder, waits in (("a", pauses), ("b", again)):
        assert judge(folder, waits, retries=10).score(numbered(1)).tolist() == [5]
    assert pauses == again and len(pauses) == 10
    assert all(0.5 * 2**attempt <= seconds <= 2**attempt for attempt, seconds in enumerate(pauses[:6]))
    assert all(30 <= seconds <= 60 for seconds in pauses[6:])


def test_a_request_is_repeated_after_a_timeout(server, judge):
    def reply(body: dict[str, Any], turn: int) -> Reply:
        time.sleep(0 if turn else 0.6)
        return graded(4)

    server.reply = reply
    assert judge(pauses=(pauses := Pauses()), timeout_s=0.2).score(numbered(1)).tolist() == [4] and pauses
    assert judge("patient", patient := Pauses()).score(numbered(1)).tolist() == [4] and patient == []


def test_a_slow_trickle_ends_at_the_deadline(monkeypatch):
    """Each read is within the timeout, but the whole answer is not."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            with connection, suppress(OSError):
                for _ in range(100):
                    connection.sendall(b" ")
                    time.sleep(0.02)

        threading.Thread(target=trickle, daemon=True).start()
        endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", "NO_KEY", 0.3, retries=0)
        began = time.monotonic()
        with pytest.raises(Exception, match=r"no complete answer in 0\.3 s"):
            endpoint.complete("hello")
        assert time.monotonic() - began < 1.5


def test_an_absent_endpoint_stops_the_run_with_the_fix(server, judge):
    server.close()
    with pytest.raises(LeviathanError, match=rf"{server.url} does not answer .*3 attempts.*scorer\.url") as caught:
        judge(pauses=(pauses := Pauses()), retries=2, concurrency=1).score(numbered(50))
    assert len(str(caught.value).splitlines()) == 1
    assert len(pauses) <= 4, "the other 48 are not tried"


def test_only_failures_in_a_row_stop_the_run(server, judge):
    """The server fails on every other record, nine times in all. Only five failures in a row stop the run."""
    server.reply = lambda body, turn: (500, {}, b"") if number_of(body) % 2 else graded(2)
    server.latency_s = 0.02  # so that each answer is checked before the next request
    scorer = judge("a", retries=1, concurrency=1)
    assert np.isnan(scorer.score(numbered(18))).tolist() == [False, True] * 9
    assert scorer.reasons == {f"id-question number {n};": "HTTP 500, 2 attempts" for n in range(1, 18, 2)}
    server.reply = lambda body, turn: (500, {}, b"") if 4 <= number_of(body) < 9 else graded(2)
    with pytest.raises(LeviathanError, match=r"does not answer .*; 4 answers are stored, and the same command"):
        judge("b", retries=0, concurrency=1).score(numbered(18))


def test_a_stop_ends_the_waits_for_retries(server, judge):
    """With real pauses: a rejected key stops the run at once, although other requests wait 500 s to retry."""
    server.reply = lambda body, turn: (401, {}, b"") if number_of(body) == 3 else (429, {"Retry-After": "500"}, b"")
    began = time.monotonic()
    with pytest.raises(LeviathanError, match="rejects the key"):
        judge(real_pauses=True, concurrency=4).score(numbered(4))
    assert time.monotonic() - began < 5


MALFORMED = {
    "html": (200, {"Content-Type": "text/html"}, b"<html>welcome</html>"),
    "no choices": (200, {}, b'{"choices": []}'),
    "a list": (200, {}, b"[1, 2]"),
    "no text": completion(None),
    "bytes": (200, {}, b"\xff\xfe\x00"),
    "nested": (200, {}, b"[" * 100_000),
    "prose": completion("I would say 4"),
    "bad request": (400, {}, b"context too long"),
    "redirect": (302, {"Location": "http://127.0.0.1:1/"}, b""),
    "compressed": (200, {"Content-Encoding": "br-nothing"}, b"zzz"),
}


def test_a_malformed_answer_costs_its_record_and_says_why(server, judge):
    replies = list(MALFORMED.values())
    server.reply = lambda body, turn: replies[number_of(body) // 2] if number_of(body) % 2 else graded(2)
    for place, name in enumerate(MALFORMED):  # a judge for each, since most answers of an endpoint must be usable
        records = numbered(2 * len(MALFORMED))[2 * place :][:2]
        scorer = judge(name)
        assert np.isnan(scorer.score(records)).tolist() == [False, True], name
        assert list(scorer.reasons) == [records[1].id] and scorer.reasons[records[1].id]
    server.reply = lambda body, turn: graded(5)
    assert judge(name).score(records).tolist() == [2, 5], "a malformed answer is not cached"


def test_a_malformed_answer_is_requested_again_with_a_reminder(server, judge):
    def reply(body: dict[str, Any], turn: int) -> Reply:
        reminded = body["messages"][0]["content"].count("Answer with exactly one JSON object") == 2
        return graded(4) if reminded and turn == number_of(body) else completion("Sure! It is a 4.")

    server.reply = reply
    scores = judge().score(numbered(4))
    assert scores[:3].tolist() == [4, 4, 4] and np.isnan(scores[3]), "three reminders"
    assert len(server.requests) == 2 + 3 + 4 + 4 and all(len(request["messages"]) == 1 for request in server.requests)


@pytest.mark.parametrize("count", [10, 11])
def test_mostly_malformed_first_answers_stop_the_run(server, judge, count):
    server.reply = lambda body, turn: completion("Drei, bitte!") if number_of(body) < count else graded(3)
    score = partial(judge(concurrency=1).score, numbered(30))
    if count == 11:
        with pytest.raises(LeviathanError, match=r"gave 11 unusable answers of the first \d+ .*Drei") as caught:
            score()
        assert len(str(caught.value).splitlines()) == 1
    else:
        assert np.isfinite(score()).sum() == 20


def test_only_the_exact_form_is_parsed():
    assert [parse_grade(f' {{"grade":{n}}}\n') for n in range(1, 6)] == [1, 2, 3, 4, 5]
    values = ['"3"', "3.0", "true", "null", "[3]", "0", "6", "1e400", '3, "why": "x"', '1, "grade": 5']
    others = ['{"grade": 3} {"grade": 3}', '[{"grade": 3}]', '[["grade", 3]]', '{"Grade": 3}']
    more = ['```json\n{"grade": 3}\n```', "{}", "3", ""]
    for answer in (*(f'{{"grade": {value}}}' for value in values), *others, *more):
        with pytest.raises(UnusableAnswer):
            print(answer, parse_grade(answer))


def test_long_documents_are_cut_in_the_middle():
    text = "".join(chr(97 + i % 26) for i in range(100))
    short = shortened(text, 30)
    assert short.startswith(text[:20]) and short.endswith(text[-10:]) and "70 characters left out" in short
    assert shortened(text, 100) == text


def test_the_judge_sees_a_long_document_cut(server, judge):
    judge(rubric="quality").score([Record("i", "d", "s", "x" * 10**6)])
    assert len(server.requests[0]["messages"][0]["content"]) < 15_000


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "", "http://", "/v1", "http://host:port/v1"])
def test_an_invalid_url_is_rejected(url):
    with pytest.raises(ConfigError, match=r"^url"):
        Endpoint(url, "m", "NO_KEY")


def test_passwords_and_broken_keys_are_not_shown(monkeypatch):
    assert Endpoint("http://user:word@host/v1?key=abc", "m", "NO_KEY").shown == "http://host/v1"
    monkeypatch.setenv("BROKEN", "sk-line\nbreak")
    with pytest.raises(ConfigError, match="key_variable=BROKEN") as caught:
        Endpoint("http://host/v1", "m", "BROKEN")
    assert "sk-" not in str(caught.value)


def test_an_unreadable_answer_is_requested_once(server, tmp_path):
    config = ScorerConfig(ScorerKind.judge, url=server.url, judge="grader", answers=str(tmp_path))
    record, sent = Record("1", "d", "s", "question 1? ANSWER", len("question 1?")), []
    (key,) = JudgeScorer(config).requests(record)
    JudgeScorer(config).endpoint.cache.refresh()  # makes the file
    JudgeScorer(config).endpoint.cache.add(key, "four")  # stored when the form was another
    for _ in range(3):
        assert JudgeScorer(config).score([record]).tolist() == [3]
        sent.append(len(server.requests))
    assert sent == [1, 1, 1], "the answer that was stored last counts"


def test_an_answer_of_another_process_is_not_requested(server, judge):
    scorer = judge()
    cache, claim = scorer.endpoint.cache, scorer.endpoint.cache.claim

    def late(key):  # another process answers between the look into the cache and the claim
        AnswerCache(cache.path).add(key, '{"grade": 4}')
        return claim(key)

    cache.claim = late
    assert scorer.score(prompts("why?")).tolist() == [4] and not server.requests


def test_a_prompt_with_two_answers_is_asked_once(server, judge):
    judge().score([Record(str(n), "d", "s", f"why? {n}", 4) for n in range(2)])
    assert len(server.requests) == 1
