"""The judge against a real server on this machine that is slow, busy, broken or lying."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError, LeviathanError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.endpoint import Endpoint, Unusable
from data.filter.score.judge import JudgeScorer, parse_difficulty, question_text, shortened
from data.filter.score.requests import AnswerCache
from tests.support.llm_server import KEY, Pauses, Reply, Server, completion, graded


def config(server: Server, **more: Any) -> ScorerConfig:
    settings = {"url": server.url, "judge": "grader", "key_variable": "JUDGE_KEY", "timeout_s": 10.0, **more}
    return ScorerConfig(ScorerKind.judge, **settings)


def scorer(server: Server, cache: Path, pauses: Pauses | None = None, **more: Any) -> JudgeScorer:
    return JudgeScorer(config(server, **more), cache, Pauses() if pauses is None else pauses)


def prompts(*texts: str) -> list[Record]:
    return [Record(f"id-{text}", "d", "s", f"{text} ANSWER", len(text)) for text in texts]


def numbered(count: int) -> list[Record]:
    return prompts(*(f"question number {i};" for i in range(count)))


def number_of(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"].rsplit("question number ", 1)[1].split(";")[0])


def test_each_record_gets_its_own_grade_in_order(server, tmp_path):
    server.reply = lambda body, turn: graded(1 + number_of(body) % 5)
    server.latency_s = 0.01
    judge = scorer(server, tmp_path)
    assert judge.score(numbered(12)).tolist() == [1 + i % 5 for i in range(12)]
    sent = server.requests[0]
    assert sent["path"] == "/v1/chat/completions" and sent["model"] == "grader" and sent["temperature"] == 0
    assert judge.reasons == {}


def test_only_the_prompt_is_shown_or_the_whole_of_a_document(server, tmp_path):
    scorer(server, tmp_path).score([*prompts("why?"), Record("doc", "d", "s", "plain text")])
    shown = [request["messages"][0]["content"] for request in server.requests]
    assert any("why?" in one and "a prompt" in one for one in shown)
    assert any("plain text" in one and "a document" in one for one in shown)
    assert not any("ANSWER" in one for one in shown)


def test_never_more_at_once_than_allowed_and_no_fewer(server, tmp_path):
    server.latency_s = 0.05
    scorer(server, tmp_path, concurrency=3).score(numbered(12))
    assert server.most_at_once == 3


def test_what_is_cached_is_not_asked_by_anybody_again(server, tmp_path):
    records = numbered(6)
    server.reply = lambda body, turn: graded(1 + number_of(body) % 5)
    first = scorer(server, tmp_path).score(records)
    server.reply = lambda body, turn: graded(5)
    second = scorer(server, tmp_path)
    assert second.score([*records, *records[:2]]).tolist() == [*first, *first[:2]]
    assert len(server.requests) == 6
    assert scorer(server, tmp_path, judge="another").score(records).tolist() == [5] * 6, "another judge is asked"
    assert scorer(server, tmp_path / "elsewhere").score(records[:1]).tolist() == [5], "without the cache too"


def test_copies_are_asked_once(server, tmp_path):
    assert scorer(server, tmp_path).score(prompts("same", "same", "same")).tolist() == [3, 3, 3]
    assert len(server.requests) == 1


def test_a_killed_run_keeps_what_it_was_told(server, tmp_path):
    """The endpoint dies after some answers; the torn line that a kill leaves is skipped."""
    server.reply = lambda body, turn: graded(4) if number_of(body) < 5 else (503, {}, b"")
    with pytest.raises(LeviathanError):
        scorer(server, tmp_path, concurrency=1, retries=0).score(numbered(40))
    file = next(tmp_path.glob("*.jsonl"))
    file.write_text(file.read_text() + '{"key": "ab')
    server.requests.clear()
    server.reply = lambda body, turn: graded(2)
    assert scorer(server, tmp_path).score(numbered(7)).tolist() == [4] * 5 + [2] * 2
    assert len(server.requests) == 2


def test_the_key_is_sent_and_kept_nowhere(server, tmp_path, caplog, capsys):
    """Not even where the server repeats it."""
    echo = {"choices": [{"message": {"content": f"Bearer {KEY}"}}]}
    server.reply = lambda body, turn: graded(3) if number_of(body) else (400, {}, json.dumps(echo).encode())
    caplog.set_level(0)
    judge = scorer(server, tmp_path)
    judge.score(numbered(3))
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    output = capsys.readouterr()
    said = f"{judge.reasons} {caplog.text} {output.out} {output.err} {judge.fingerprint}"
    assert "difficulty" not in kept and kept.count("\n") == 2
    assert KEY not in kept + said and "[key]" in str(judge.reasons)


def test_without_a_key_none_is_sent(server, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    scorer(server, tmp_path).score(numbered(1))
    assert "Authorization" not in server.headers[0]
    server.reply = lambda body, turn: (401, {}, b"")
    with pytest.raises(LeviathanError, match="wants a key: set JUDGE_KEY"):
        scorer(server, tmp_path / "b").score(numbered(1))


@pytest.mark.parametrize(("status", "said"), [(401, "refuses the key in JUDGE_KEY"), (404, "no model 'grader'")])
def test_what_no_retry_would_mend_stops_at_once(server, tmp_path, status, said):
    server.reply = lambda body, turn: (status, {}, f"who is {KEY}?".encode())
    pauses = Pauses()
    with pytest.raises(LeviathanError, match=said) as caught:
        scorer(server, tmp_path, pauses, concurrency=1).score(numbered(3))
    assert pauses == [] and KEY not in str(caught.value)


def test_busy_servers_are_waited_for_as_they_ask(server, tmp_path):
    server.reply = lambda body, turn: graded(2) if turn else (429, {"Retry-After": "7"}, b"slow down")
    pauses = Pauses()
    assert scorer(server, tmp_path, pauses).score(numbered(2)).tolist() == [2, 2]
    assert pauses == [7, 7]


def test_retry_after_may_be_a_date_or_nonsense(server, tmp_path):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    asked = [later, "soon", "-5", "99999999", "nan"]
    server.reply = lambda body, turn: (429, {"Retry-After": asked[turn]}, b"") if turn < len(asked) else graded(1)
    pauses = Pauses()
    assert scorer(server, tmp_path, pauses).score(numbered(1)).tolist() == [1]
    date, soon, negative, forever, no_number = pauses
    assert 25 < date <= 30 and forever == 600
    assert 1 <= soon <= 2 and 2 <= negative <= 4 and 8 <= no_number <= 16, "its own backoff then"


def test_server_errors_are_retried_with_growing_waits_that_are_the_same_each_time(server, tmp_path):
    server.reply = lambda body, turn: graded(5) if turn % 5 == 4 else (500, {}, b"oops")
    pauses, again = Pauses(), Pauses()
    assert scorer(server, tmp_path / "a", pauses).score(numbered(1)).tolist() == [5]
    assert scorer(server, tmp_path / "b", again).score(numbered(1)).tolist() == [5]
    assert pauses == again and len(pauses) == 4
    for attempt, seconds in enumerate(pauses):
        assert 0.5 * 2**attempt <= seconds <= 2**attempt


def test_waits_do_not_grow_for_ever(server, tmp_path):
    server.reply = lambda body, turn: graded(5) if turn == 10 else (500, {}, b"oops")
    pauses = Pauses()
    assert scorer(server, tmp_path, pauses, retries=10).score(numbered(1)).tolist() == [5]
    assert len(pauses) == 10 and all(30 <= seconds <= 60 for seconds in pauses[6:])


def test_a_slow_answer_is_asked_for_again(server, tmp_path):
    def reply(body: dict[str, Any], turn: int) -> Reply:
        time.sleep(0 if turn else 0.6)
        return graded(4)

    server.reply = reply
    pauses = Pauses()
    assert scorer(server, tmp_path, pauses, timeout_s=0.2).score(numbered(1)).tolist() == [4]
    assert len(pauses) >= 1
    assert scorer(server, tmp_path / "patient", patient := Pauses()).score(numbered(1)).tolist() == [4]
    assert patient == []


def test_a_trickle_ends_at_the_deadline(monkeypatch):
    """Each read is in time, the whole is not."""
    import socket

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                try:
                    connection.sendall(b" ")
                except OSError:
                    break
                time.sleep(0.02)
            connection.close()

        threading.Thread(target=trickle, daemon=True).start()
        endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", "NO_KEY", 0.3, retries=0)
        began = time.monotonic()
        with pytest.raises(Exception, match=r"no whole answer in 0\.3 s"):
            endpoint.complete("hello")
        assert time.monotonic() - began < 1.5


def test_an_endpoint_that_is_not_there_stops_the_run_with_its_name_and_the_fix(server, tmp_path):
    server.close()
    pauses = Pauses()
    with pytest.raises(LeviathanError, match=rf"{server.url} does not answer .*3 times.*scorer\.url") as caught:
        scorer(server, tmp_path, pauses, retries=2, concurrency=1).score(numbered(50))
    assert len(str(caught.value).splitlines()) == 1
    assert len(pauses) <= 4, "the other 48 are not tried in vain"


def test_one_record_that_breaks_the_server_costs_that_record_only(server, tmp_path):
    server.reply = lambda body, turn: (500, {}, b"") if number_of(body) == 3 else graded(2)
    judge = scorer(server, tmp_path, retries=1, concurrency=1)
    found = judge.score(numbered(8))
    assert np.isnan(found).tolist() == [i == 3 for i in range(8)]
    assert judge.reasons == {"id-question number 3;": "HTTP 500, 2 times"}


def test_only_failures_in_a_row_count_as_gone(server, tmp_path):
    """Every other record breaks the server, nine in all; five in a row would stop the run."""
    server.reply = lambda body, turn: (500, {}, b"") if number_of(body) % 2 else graded(2)
    server.latency_s = 0.02  # so that each answer is looked at before the next
    found = scorer(server, tmp_path / "a", retries=0, concurrency=1).score(numbered(18))
    assert np.isnan(found).tolist() == [False, True] * 9
    server.reply = lambda body, turn: (500, {}, b"") if 4 <= number_of(body) < 9 else graded(2)
    with pytest.raises(LeviathanError, match="does not answer"):
        scorer(server, tmp_path / "b", retries=0, concurrency=1).score(numbered(18))


def test_a_stop_does_not_wait_for_those_that_wait(server, tmp_path):
    """Real pauses: one record is refused for good while others would wait ten minutes."""
    server.reply = lambda body, turn: (401, {}, b"") if number_of(body) == 3 else (429, {"Retry-After": "500"}, b"")
    began = time.monotonic()
    with pytest.raises(LeviathanError, match="refuses the key"):
        JudgeScorer(config(server, concurrency=4), tmp_path).score(numbered(4))
    assert time.monotonic() - began < 5


LIES = {
    "html": (200, {"Content-Type": "text/html"}, b"<html>welcome</html>"),
    "nothing": (200, {}, b""),
    "no choices": (200, {}, b'{"choices": []}'),
    "a list": (200, {}, b"[1, 2]"),
    "no text": completion(None),
    "bytes": (200, {}, b"\xff\xfe\x00"),
    "nested": (200, {}, b"[" * 100_000),
    "prose": completion("I would say 4"),
    "zero": graded(0),
    "six": graded(6),
    "huge": completion('{"difficulty": 1e400}'),
    "bad request": (400, {}, b"context too long"),
    "redirect": (302, {"Location": "http://127.0.0.1:1/"}, b""),
    "compressed": (200, {"Content-Encoding": "br-nothing"}, b"zzz"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_its_record_and_says_why(server, tmp_path, lie):
    server.reply = lambda body, turn: LIES[lie] if number_of(body) == 1 else graded(2)
    judge = scorer(server, tmp_path)
    found = judge.score(numbered(4))
    assert np.isnan(found).tolist() == [False, True, False, False]
    assert list(judge.reasons) == ["id-question number 1;"] and judge.reasons["id-question number 1;"]
    server.reply = lambda body, turn: graded(5)
    assert scorer(server, tmp_path).score(numbered(4)).tolist() == [2, 5, 2, 2], "a lie is not kept"


def test_a_muddled_answer_is_asked_for_once_more_with_a_reminder(server, tmp_path):
    def reply(body: dict[str, Any], turn: int) -> Reply:
        reminded = "Answer with exactly one JSON object" in body["messages"][0]["content"]
        return graded(4) if reminded else completion("Sure! It is a 4.")

    server.reply = reply
    assert scorer(server, tmp_path).score(numbered(3)).tolist() == [4, 4, 4]
    assert len(server.requests) == 6
    assert all(len(request["messages"]) == 1 for request in server.requests)


@pytest.mark.parametrize("lies", [10, 11])
def test_who_lies_more_often_than_not_at_first_is_stopped(server, tmp_path, lies):
    server.reply = lambda body, turn: LIES["html"] if number_of(body) < lies else graded(3)
    judge = scorer(server, tmp_path, concurrency=1)
    if lies == 11:
        with pytest.raises(LeviathanError, match=r"11 of its first \d+ answers are of no use .*welcome") as caught:
            judge.score(numbered(30))
        assert len(str(caught.value).splitlines()) == 1
    else:
        assert np.isfinite(judge.score(numbered(30))).sum() == 20


@pytest.mark.parametrize(
    "answer",
    [
        '{"difficulty": "3"}',
        '{"difficulty": 3.0}',
        '{"difficulty": true}',
        '{"difficulty": null}',
        '{"difficulty": [3]}',
        '{"difficulty": 3, "why": "x"}',
        '{"difficulty": 1, "difficulty": 5}',
        '{"difficulty": 3} {"difficulty": 3}',
        '[{"difficulty": 3}]',
        '[["difficulty", 3]]',
        '```json\n{"difficulty": 3}\n```',
        '{"Difficulty": 3}',
        "{}",
        "3",
        "",
    ],
)
def test_nothing_is_guessed(answer):
    with pytest.raises(Unusable):
        parse_difficulty(answer)


def test_the_wanted_form_is_read():
    assert [parse_difficulty(f' {{"difficulty":{n}}}\n') for n in range(1, 6)] == [1, 2, 3, 4, 5]


def test_long_documents_lose_their_middle():
    text = "".join(chr(97 + i % 26) for i in range(100))
    short = shortened(text, 30)
    assert short.startswith(text[:20]) and short.endswith(text[-10:]) and "70 characters left out" in short
    assert shortened(text, 100) == text
    assert len(question_text(Record("i", "d", "s", "x" * 10**6))) < 15_000


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "", "http://", "/v1", "http://host:port/v1"])
def test_what_is_no_address_is_refused_before_anything_is_asked(url):
    with pytest.raises(ConfigError, match=r"^url"):
        Endpoint(url, "m", "NO_KEY")


def test_passwords_and_broken_keys_are_not_shown(monkeypatch):
    assert Endpoint("http://user:word@host/v1?key=abc", "m", "NO_KEY").shown == "http://host/v1"
    monkeypatch.setenv("BROKEN", "sk-line\nbreak")
    with pytest.raises(ConfigError, match="key_variable=BROKEN") as caught:
        Endpoint("http://host/v1", "m", "BROKEN")
    assert "sk-" not in str(caught.value)


def test_many_threads_may_add_to_one_cache(tmp_path):
    cache = AnswerCache(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: cache.add(f"key{i}", i), range(500)))
    again = AnswerCache(tmp_path)
    assert all(again[f"key{i}"] == i for i in range(500)) and "key500" not in again
