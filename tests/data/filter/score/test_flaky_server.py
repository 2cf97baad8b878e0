"""A judge that is slow, lies and dies now and then: every label is had, and no valid answer is requested again."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import LeviathanError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score import endpoint
from data.filter.score.answers import AnswerCache, _lock_byte
from data.filter.score.ensemble import EnsembleScorer
from data.filter.score.judge import JudgeScorer
from data.filter.score.pass_rate import PassRateScorer
from tests.support.fakes.flaky_server import FAULTS, LIES, FlakyServer, answers_in
from tests.support.filtering import write_lines


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FlakyServer]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    started: list[FlakyServer] = []

    def start(**settings: Any) -> FlakyServer:
        started.append(FlakyServer(**settings))
        return started[-1]

    yield start
    for server in started:
        server.close()


def hurried(seconds: float) -> None:
    time.sleep(seconds / 20)


def judge(server: Any, folder: Path, **settings: Any) -> JudgeScorer:
    settings = {"url": server.url, "judge": "grader", "timeout_s": 10.0, "answers": str(folder), **settings}
    return JudgeScorer(ScorerConfig(ScorerKind.judge, **settings), hurried)


def questions(count: int) -> list[Record]:
    return [Record(f"{n}", "d", "s", f"question {n}? ANSWER", len(f"question {n}?")) for n in range(count)]


def wanted(records: list[Record]) -> list[int]:
    return [FlakyServer.grade(record.prompt) for record in records]


def test_a_flaky_server_gives_every_label_once(flaky, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST_ANSWER_BYTES", 1 << 20)
    server, records = flaky(valid=0.4, lives=60, down_s=0.05, late_s=0.4, patience=2), questions(40)
    first = judge(server, tmp_path, timeout_s=0.3)
    assert first.score(records).tolist() == wanted(records), first.reasons
    assert server.repeated == [] and server.deaths > 0 and sum(server.asked.values()) > 60
    assert len(server.kinds.keys() & (LIES.keys() | FAULTS.keys())) > 10, "most kinds of trouble occurred"
    keys = answers_in(tmp_path)
    assert len(keys) == len(set(keys)) == 40, "an answer that took three attempts is one answer"
    assert ": 40 of 40 answers, " in first.endpoint.progress()
    again = judge(server, tmp_path, concurrency=3, retries=1, url=server.url.replace("127.0.0.1", "localhost"))
    ensemble = EnsembleScorer([judge(server, tmp_path), judge(server, tmp_path, rubric="difficulty")])
    ensemble.fit(lambda: records)
    for scores in (again.score(records), ensemble.score_all(records)[1]["judge[1]"]):
        assert scores.tolist() == wanted(records)
    assert server.repeated == []


def test_other_rubrics_and_models_have_other_answers(server, tmp_path):
    """The opposite of the above: what could change an answer is a new request."""
    records = questions(3)
    scorers = [judge(server, tmp_path, **one) for one in ({}, {"rubric": "quality"}, {"judge": "b"}, {"judge": "B"})]
    for scorer in scorers:
        scorer.score(records)
    assert len(server.requests) == 12
    assert len({(body["model"], body["messages"][0]["content"]) for body in server.requests}) == 12
    assert len(list(tmp_path.glob("judge-*.jsonl"))) == 3, "one file for each model"
    assert len({key for scorer in scorers for key in scorer.requests(records[0])}) == 4, "keys differ in any file"


@contextmanager
def always(key: str) -> Iterator[bool]:
    yield True


@pytest.mark.parametrize("with_claims", [True, False])
def test_scorers_at_once_share_the_requests(server, tmp_path, monkeypatch, with_claims):
    """Each has its own open file, as processes have."""
    server.latency_s, records = 0.02, questions(16)
    scorers = [judge(server, tmp_path, concurrency=4) for _ in range(3)]
    if not with_claims:
        for scorer in scorers:
            monkeypatch.setattr(scorer.endpoint.cache, "claim", always)
    with ThreadPoolExecutor(3) as pool:
        scores = list(pool.map(lambda scorer: scorer.score(records).tolist(), scorers))
    assert scores == [[3] * 16] * 3
    assert (len(server.requests) == 16) == with_claims, "control: without claims they repeat each other's requests"


def test_a_claim_ends_with_its_process(tmp_path):
    key, cache = "f" * 64, AnswerCache(tmp_path / "a.jsonl")
    program = f"""
import sys, time
from pathlib import Path
from data.filter.score.answers import AnswerCache
with AnswerCache(Path({str(tmp_path / "a.jsonl")!r})).claim({key!r}) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "True\n"
    with cache.claim(key) as mine, cache.claim("e" * 64) as another:
        assert not mine and another
    other.kill()
    other.wait()
    with cache.claim(key) as mine, cache.claim(key) as twice:
        assert mine and not twice


def test_one_answer_is_written_at_a_time(tmp_path):
    cache = AnswerCache(tmp_path / "a.jsonl")
    writer = threading.Thread(target=cache.add, args=("f" * 64, "4"))
    with cache.path.open("ab") as other:
        assert _lock_byte(other, 0, fcntl.F_OFD_SETLK)
        writer.start()
        writer.join(0.1)
        assert writer.is_alive() and not cache.path.stat().st_size
    writer.join(10)
    cache.refresh()
    assert cache.get("f" * 64) == "4"


def test_a_line_that_is_being_written_is_read_later(tmp_path):
    path, key = tmp_path / "a.jsonl", "f" * 64
    cache, line = AnswerCache(path), json.dumps({"key": key, "answer": "4"}) + "\n"
    for part in (line[:30], line[30:]):
        assert key not in cache and cache.get(key) is None
        with path.open("a") as file:
            file.write(part)
        cache.refresh()
    assert cache.get(key) == "4"
    replaced = AnswerCache(path)
    replaced._places["e" * 64] = 0
    assert replaced.get("e" * 64) is None, "a line of another request, in a file that was replaced"


def test_damaged_answers_are_requested_again(server, tmp_path):
    records = questions(5)
    judge(server, tmp_path).score(records)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"3", b"9")  # a key or a grade that nobody gave
    lines[2] = b"\xff" + lines[2]
    file.write_bytes(b"".join(lines)[:-4])
    server.requests.clear()
    assert judge(server, tmp_path).score(records).tolist() == [3] * 5 and len(server.requests) == 3
    assert file.read_bytes().endswith(b"}\n") and len(file.read_bytes().splitlines()) == 8, "the torn line is ended"
    server.requests.clear()
    assert judge(server, tmp_path).score(records).tolist() == [3] * 5 and not server.requests


def test_a_server_that_dies_for_good_is_given_up(flaky, tmp_path):
    server = flaky(valid=1.0, lives=20, down_s=60.0)
    began = time.monotonic()
    with pytest.raises(
        LeviathanError, match=r"does not answer .* answers are stored, and the same command req"
    ) as caught:
        judge(server, tmp_path).score(questions(200))
    assert len(str(caught.value).splitlines()) == 1 and time.monotonic() - began < 5
    stored = len(answers_in(tmp_path))
    assert stored == sum(server.answered.values()) > 0 and f"{stored} answers are stored" in str(caught.value)


def test_the_cost_is_known_before_the_first_request(server, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sure.py").write_text("def check(record, answer): return True")
    records = [*questions(10), *questions(10)]
    scorer = judge(server, tmp_path)
    assert scorer.cost(lambda: iter(records)).startswith("10 requests to grader, about ") and not server.requests
    scorer.score(records[:4])
    (body, *_), cost = server.requests, judge(server, tmp_path).cost(lambda: iter(records))
    tokens = 6 * len(body["messages"][0]["content"].encode()) // 4
    assert cost == (
        f"6 requests to grader, about {tokens:,} tokens in and 18 out (estimated: 4 bytes each); "
        f"4 answers are in {tmp_path}"
    )
    scorer.cost(lambda: iter(records))
    monkeypatch.setattr(scorer.endpoint, "_began", time.monotonic() - 60)
    assert "4 of 10 answers, 4 a minute, 2 min left" in scorer.endpoint.progress()
    settings = {"url": server.url, "judge": "m", "verifier": "sure:check", "samples": 3, "answers": str(tmp_path)}
    sampled = PassRateScorer(ScorerConfig(ScorerKind.pass_rate, **settings))
    assert sampled.cost(lambda: records).startswith("30 requests to m, about ")
    ensemble = EnsembleScorer([judge(server, tmp_path), sampled])
    assert ensemble.cost(lambda: records).startswith("6 requests to grader, ") and "; 0 requests" in ensemble.cost(list)


COMMAND = "from launch.cli import main; import sys; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_labels_are_had_through_kills_and_other_settings(flaky, tmp_path):
    """500 labels by the command with default settings of the connection. The first command is killed half-way."""
    server, records = flaky(valid=0.6, lives=400, down_s=3.0), questions(500)
    source = write_lines(tmp_path / "in.jsonl", [{"q": one.prompt, "a": f"It is {one.id}."} for one in records])
    environment = {**os.environ, "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1,localhost"}
    folder = tmp_path / ".cache" / "leviathan" / "answers"

    def start(out: str, *more: str) -> subprocess.Popen[str]:
        words = ["filter", f"input={source}", "prompt_key=q", "response_key=a", f"out={tmp_path / out}"]
        words += ["scorer.kind=judge", f"scorer.url={server.url}", "scorer.judge=grader", "duplicates.near=null"]
        words += ["gates.min_characters=null", *more]
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", COMMAND, *words], env=environment, stdout=pipe, text=True)

    server.hold_at = 250
    server.go.clear()
    first = start("out")
    deadline = time.monotonic() + 240
    while not (folder.exists() and len(answers_in(folder)) == 250):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    server.die()
    server.hold_at = None
    server.go.set()
    url = f"scorer.url={server.url.replace('127.0.0.1', 'localhost')}"
    both = [start("second", "keep=0.3", "scorer.concurrency=5", url), start("third", "seed=4", "scorer.timeout_s=30")]
    said = [one.communicate(timeout=400)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert any("requests to grader" in one and "answers are in" in one for one in said)
    keys = answers_in(folder)
    print(json.dumps({"requests": sum(server.asked.values()), "deaths": server.deaths, **server.kinds}))
    assert len(keys) == len(set(keys)) == 500 == len(server.answered), "500 labels"
    assert server.repeated == [] and set(server.answered.values()) == {1}
    requests = sum(server.asked.values())
    judge_ = f"{{kind: judge, url: '{server.url}', judge: grader}}"
    last = start("fourth", "scorer.kind=ensemble", f"scorer.members=[{judge_}, {{kind: length}}]")
    assert last.wait(120) == 0 and sum(server.asked.values()) == requests, "an ensemble asks nobody"
    assert np.isfinite(server.deaths)
