"""Send concurrent requests to one LLM endpoint, each once. Stop after repeated malformed or missing answers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import LeviathanError
from core.files import sha256_text
from core.process import told_every
from data.filter.config import ScorerConfig
from data.filter.input.records import Record
from data.filter.score.answers import AnswerCache
from data.filter.score.endpoint import NO_COMPLETION, Endpoint, RetriesExhausted, UnusableAnswer
from data.filter.score.scorer import Scorer

FIRST_ANSWERS = 20
"""Number of first answers to check. If more than half are unusable, stop: it is probably the wrong endpoint."""
FAILURES_IN_A_ROW = 5
"""Consecutive requests without an answer after which the endpoint counts as down. Fewer may be due to the requests."""
REMINDERS = 3
PROGRESS_S = 10.0
"""Seconds between two lines of progress."""
CLAIMED_S = 0.1
"""Seconds between two looks for an answer that another process has requested."""
BYTES_PER_TOKEN = 4
"""For the estimate of costs. English text has four to five."""
_FIXES = {
    "HTTP": "look at its log; for a limit of its rate, raise scorer.retries or",
    NO_COMPLETION: "check that scorer.url is a chat endpoint (usually ends in /v1); if it is overloaded,",
    "": "start the server or correct scorer.url; if it is slow, raise scorer.timeout_s or",
}
"""What to do, by the start of the first failure."""


@dataclass(frozen=True)
class Request:
    """`parse` returns what an answer's text means, or raises `UnusableAnswer`: then the request is repeated up to
    `REMINDERS` times, with the reminder appended. `options` are added to the request. `answer_bytes` is the expected
    length of an answer, for the estimate of costs.
    """

    content: str
    parse: Callable[[str], Any]
    answer_bytes: int
    reminder: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


class CachedEndpoint:
    """Send requests to an endpoint, `concurrency` at a time, and cache the answers."""

    def __init__(self, endpoint: Endpoint, cache: AnswerCache, concurrency: int) -> None:
        self.endpoint, self.cache, self.concurrency = endpoint, cache, concurrency
        self.missing: set[str] = set()
        """Keys of the requests whose answers were not stored when they were first needed."""
        self._began = 0.0
        self._failed = 0
        self._first: list[bool] = []
        """Whether each of the first answers was unusable."""

    def cached(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """Return the stored answers that can be parsed, by request key. Add the keys of the others to `missing`."""
        self.cache.refresh()
        found = {}
        for key, request in requests.items():
            with suppress(UnusableAnswer):
                if (text := self.cache.get(key)) is not None:
                    found[key] = request.parse(text)
        self.missing.update(requests.keys() - found.keys())
        return found

    def answers(self, requests: Mapping[str, Request]) -> dict[str, Any]:
        """Return, by request key, the answer or an `UnusableAnswer` with the reason. Cached answers cost no request.

        Raises `LeviathanError` with the fix if the endpoint cannot be reached, rejects the key or the model, or sends
        mostly unusable answers at first. All answers received until then are cached, and no more requests are sent.
        """
        found = self.cached(requests)
        self._began = self._began or time.monotonic()
        with ThreadPoolExecutor(self.concurrency) as pool, told_every(PROGRESS_S, self.progress):
            try:
                keys = {pool.submit(self._request, key, one): key for key, one in requests.items() if key not in found}
                for future in as_completed(keys):
                    found[keys[future]] = answer = future.result()
                    self._check_endpoint(answer)
            except BaseException:
                self.endpoint.stopped.set()
                raise
        return found

    def progress(self) -> str:
        """Describe how many answers have arrived, from any process, and the time left at this rate."""
        self.cache.refresh()
        keys = list(self.missing)  # other threads may add some
        whole, left = len(keys), sum(key not in self.cache for key in keys)
        rate = (whole - left) / max(time.monotonic() - self._began, 1e-3) * 60
        speed = f", {rate:,.0f} a minute, {left / rate:,.0f} min left" if rate > 0 else ""
        return f"{self.endpoint.shown}: {whole - left:,} of {whole:,} answers{speed}{self.endpoint.trouble}"

    def _request(self, key: str, request: Request) -> Any:
        """Return the answer once it is in the cache, or an `UnusableAnswer` as a value."""
        while not self.endpoint.stopped.is_set():
            with self.cache.claim(key) as claimed:
                if found := self.cached({key: request}):
                    return found[key]
                try:
                    if claimed:
                        return self._send(key, request)
                except UnusableAnswer as error:
                    return error
            self.endpoint.stopped.wait(CLAIMED_S)  # another process waits for the answer, or has just failed
        return RetriesExhausted("stopped")

    def _send(self, key: str, request: Request) -> Any:
        content, reminders = request.content, REMINDERS
        while True:
            text = self.endpoint.complete(content, **request.options)
            try:
                answer = request.parse(text)
            except UnusableAnswer:
                if not reminders:
                    raise
            else:
                self.cache.add(key, text)
                return answer
            content, reminders = f"{request.content}\n\n{request.reminder}", reminders - 1

    def _check_endpoint(self, answer: Any) -> None:
        """Raise `LeviathanError` if the endpoint does not answer, or most of its first answers are unusable."""
        self._failed = self._failed + 1 if isinstance(answer, RetriesExhausted) else 0
        problem, why = "", self.endpoint.first_failure
        if self._failed >= (FAILURES_IN_A_ROW if self.endpoint.reached else 1):
            fix = next(fix for begin, fix in _FIXES.items() if why.startswith(begin))
            problem = f"does not answer ({why}): {fix} lower scorer.concurrency"
        elif not self._failed and len(self._first) < FIRST_ANSWERS:
            self._first.append(isinstance(answer, UnusableAnswer))
            if (bad := sum(self._first)) > FIRST_ANSWERS // 2:
                problem = (
                    f"gave {bad} unusable answers of the first {len(self._first)} ({answer}): check scorer.url, and"
                )
                problem += " that scorer.judge is a model that can follow the format"
        if problem:
            stored = sum(key in self.cache for key in self.missing)
            again = f"; {stored:,} answers are stored, and the same command requests the others" if stored else ""
            raise LeviathanError(f"{self.endpoint.shown} {problem}{again}")


class EndpointScorer(Scorer):
    """Base of scorers that send requests for each record. A score is NaN if an answer is missing or unusable; `reasons`
    then has the reason by record id. Failures are not cached: the next filter run repeats the failed requests.

    Answers are stored in `config.answers`, in one file for each kind of scorer and model.
    """

    def __init__(self, config: ScorerConfig, pause: Callable[[float], object] | None = None) -> None:
        """`pause` replaces the wait before a retry, in tests. Raises `ConfigError` for an invalid URL."""
        assert config.url and config.judge  # ScorerConfig checks it
        self.model, self.reasons = config.judge, dict[str, str]()
        endpoint = Endpoint(config.url, config.judge, config.key_variable, config.timeout_s, config.retries, pause)
        file = f"{self.name}-{re.sub('[^A-Za-z0-9.-]', '_', self.model)[:80]}-{sha256_text(self.model)[:8]}.jsonl"
        cache = AnswerCache(Path(config.answers).expanduser() / file)
        self.endpoint = CachedEndpoint(endpoint, cache, config.concurrency)

    def requests(self, record: Record) -> dict[str, Request]:
        """Return the requests for a record by cache key."""
        raise NotImplementedError

    def score_from(self, record: Record, answers: Sequence[Any]) -> float:
        """Return the score from the answers to `requests`, in their order. Raises `UnusableAnswer` with the reason."""
        raise NotImplementedError

    def cost(self, records: Callable[[], Iterable[Record]]) -> str:
        """Describe in one line what scoring these records costs: requests and tokens, and the answers in the cache."""
        keys, stored, sent, received = set[str](), 0, 0, 0
        for record in records():
            requests = {key: one for key, one in self.requests(record).items() if key not in keys}
            keys.update(requests)
            missing = requests.keys() - self.endpoint.cached(requests).keys()
            stored += len(requests) - len(missing)
            sent += sum(len(requests[key].content.encode()) for key in missing)
            received += sum(requests[key].answer_bytes for key in missing)
        tokens = f"about {sent // BYTES_PER_TOKEN:,} tokens in and {received // BYTES_PER_TOKEN:,} out (estimated:"
        have = f"{BYTES_PER_TOKEN} bytes each); {stored:,} answers are in {self.endpoint.cache.path.parent}"
        return f"{len(keys) - stored:,} requests to {self.model}, {tokens} {have}"

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
