"""Send concurrent, cached requests to one LLM endpoint. Stop after repeated malformed or missing answers."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import DataError, LeviathanError
from core.files import misfit, parse_json
from core.process import told_every
from data.filter.config import ScorerConfig
from data.filter.input.records import Record
from data.filter.score.endpoint import Endpoint, RetriesExhausted, UnusableAnswer
from data.filter.score.scorer import Scorer
from data.filter.store import writing

FIRST_ANSWERS = 20
"""Number of first answers to check. If more than half are unusable, stop: it is probably the wrong endpoint."""
PROGRESS_S = 10.0
"""Seconds between two lines of progress."""
FAILURES_IN_A_ROW = 5
"""Consecutive requests without an answer after which the endpoint counts as down. Fewer may be due to the requests."""


@dataclass(frozen=True)
class Request:
    """`parse` turns an answer's text into the cached value (a number or a string) or raises `UnusableAnswer`. In that
    case a request with a `reminder` is repeated once, with the reminder appended. `options` are added to the request.
    """

    content: str
    parse: Callable[[str], Any]
    reminder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    is_valid: Callable[[Any], bool] = lambda value: isinstance(value, str)
    """Whether a value can be cached: others are in a damaged cache, and are not used."""


class AnswerCache(dict[str, Any]):
    """Answers by key, stored as lines of JSON in a directory that any number of processes share.

    Each process appends to its own file. A killed process leaves at most one incomplete line, which is skipped. Lines
    that other processes write after this cache was loaded are not seen.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        for path in sorted(directory.glob("*.jsonl")):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror or error}): fix or remove it") from None
            for line in content.splitlines():
                with suppress(ValueError):  # incomplete
                    entry = parse_json(line)
                    if not misfit(entry, {"key": str, "answer": (str, int)}):
                        self[entry["key"]] = entry["answer"]

    def add(self, key: str, answer: Any) -> None:
        """Write an answer to disk, then add it to this dictionary. Raises `DataError` if it cannot be written."""
        line = json.dumps({"key": key, "answer": answer})
        with self._lock, writing(self.directory):
            if self._file is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                name = f"{os.getpid()}-{uuid.uuid4().hex}.jsonl"
                self._file = open(self.directory / name, "w")  # noqa: SIM115 - stays open as long as this object
            self._file.write(line + "\n")
            self._file.flush()
            self[key] = answer


class CachedEndpoint:
    """Send requests to an endpoint, `concurrency` at a time, and cache the answers."""

    def __init__(self, endpoint: Endpoint, cache: AnswerCache, concurrency: int) -> None:
        self.endpoint, self.cache, self.concurrency = endpoint, cache, concurrency
        self._answered = self._unusable = self._failed = 0
        self._reached = False
        self._first_failure: RetriesExhausted | None = None

    def answers(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """Return, by request key, the answer or an `UnusableAnswer` with the reason. Cached answers cost no request.

        Raises `LeviathanError` with the fix if the endpoint cannot be reached, rejects the key or the model, or sends
        mostly unusable answers at first. All answers received until then are cached, and no more requests are sent.
        """
        cached = {key: self.cache[key] for key in requests if key in self.cache}
        found = {key: value for key, value in cached.items() if requests[key].is_valid(value)}
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            keys = {pool.submit(self._request, key, one): key for key, one in requests.items() if key not in found}
            with told_every(PROGRESS_S, lambda: self._progress(len(found), len(requests))):
                for future in as_completed(keys):
                    found[keys[future]] = answer = future.result()
                    self._check_endpoint(answer)
        except BaseException:
            self.endpoint.stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        failed = {key: UnusableAnswer(str(one)) for key, one in found.items() if isinstance(one, RetriesExhausted)}
        return found | failed

    def _progress(self, done: int, total: int) -> str:
        return f"{self.endpoint.shown}: {done} of {total} answers{self.endpoint.trouble}"

    def _request(self, key: str, request: Request) -> Any:
        """Return the answer and add it to the cache, or return an `UnusableAnswer` or `RetriesExhausted` as a value."""
        contents = [request.content]
        if request.reminder is not None:
            contents.append(f"{request.content}\n\n{request.reminder}")
        failure: Exception | None = None
        for content in contents:
            try:
                answer = request.parse(self.endpoint.complete(content, **request.options))
            except UnusableAnswer as error:
                failure = error
            except RetriesExhausted as error:
                self._first_failure = self._first_failure or error
                if not self._reached:
                    self.endpoint.stopped.set()  # the endpoint never answered: other requests would fail too
                return error
            else:
                self._reached = True
                self.cache.add(key, answer)
                return answer
        return failure

    def _check_endpoint(self, answer: Any) -> None:
        """Raise `LeviathanError` if the endpoint does not answer, or most of its first answers are unusable."""
        where = self.endpoint.shown
        if isinstance(answer, RetriesExhausted):
            self._failed += 1
            if not self._reached or self._failed >= FAILURES_IN_A_ROW:
                failure = str(self._first_failure)
                if failure.startswith("HTTP"):
                    fix = "look at its log; for a limit of its rate, raise scorer.retries or lower scorer.concurrency"
                    raise LeviathanError(f"{where} does not answer ({failure}): {fix}")
                fix = "start the server or correct scorer.url; if it is slow, raise scorer.timeout_s or lower"
                raise LeviathanError(f"{where} does not answer ({failure}): {fix} scorer.concurrency")
            return
        self._reached, self._failed = True, 0
        if self._answered < FIRST_ANSWERS:
            self._answered += 1
            self._unusable += isinstance(answer, UnusableAnswer)
            if self._unusable > FIRST_ANSWERS // 2:
                fix = "check that scorer.url is a chat endpoint and that the model can follow the format"
                counts = f"{self._unusable} of the first {self._answered} answers are unusable"
                raise LeviathanError(f"{where}: {counts} ({answer}): {fix}")


class EndpointScorer(Scorer):
    """Base of scorers that send requests for each record. A score is NaN if an answer is missing or unusable; `reasons`
    then has the reason by record id. Failures are not cached: the next filter run repeats the failed requests.
    """

    def __init__(self, config: ScorerConfig, cache: Path, pause: Callable[[float], object] | None = None) -> None:
        """`pause` replaces the wait before a retry, in tests. Raises `ConfigError` for an invalid URL."""
        assert config.url and config.judge  # ScorerConfig checks it
        self.model, self.reasons = config.judge, dict[str, str]()
        limits = (config.timeout_s, config.retries, config.concurrency)
        endpoint = Endpoint(config.url, config.judge, config.key_variable, *limits, pause=pause)
        self.endpoint = CachedEndpoint(endpoint, AnswerCache(cache), config.concurrency)

    def requests(self, record: Record) -> dict[str, Request]:
        """Return the requests for a record by cache key."""
        raise NotImplementedError

    def score_from(self, record: Record, answers: Sequence[Any]) -> float:
        """Return the score from the answers to `requests`, in their order. Raises `UnusableAnswer` with the reason."""
        raise NotImplementedError

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        requests = [self.requests(record) for record in records]
        answers = self.endpoint.answers({key: request for one in requests for key, request in one.items()})
        scores = np.full(len(records), np.nan)
        for place, (record, keys) in enumerate(zip(records, requests, strict=True)):
            found = [answers[key] for key in keys]
            try:
                for answer in found:
                    if isinstance(answer, UnusableAnswer):
                        raise answer
                scores[place] = self.score_from(record, found)
            except UnusableAnswer as error:
                self.reasons[record.id] = str(error)
        return scores
