"""Many questions to one endpoint: side by side, each once in the life of a cache, and not to a liar for long."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core.errors import DataError, LeviathanError
from data.filter.score.endpoint import Endpoint, GaveUp, Unusable
from data.filter.store import writing

FIRST_ANSWERS = 20
"""Among so many the endpoint shows whether it is what the user thinks it is."""
GIVEN_UP_IN_A_ROW = 5
"""Questions without an answer before the endpoint counts as gone; one or two may be the questions' own fault."""


@dataclass(frozen=True)
class Question:
    """`parse` turns the answer's text into what is kept (a number or a string) or raises `Unusable`; then the question
    is put once more, with `reminder` after it, if there is one. `options` go into the request.
    """

    content: str
    parse: Callable[[str], Any]
    reminder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class AnswerCache:
    """Answers by key, as lines of JSON in a directory that any number of processes share.

    Each process appends to a file of its own, so that a kill leaves at most one torn line, which reading skips. What
    other processes write after this one has started is not seen.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, Any] = {}
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        for path in sorted(directory.glob("*.jsonl")):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror or error}): mend or remove it") from None
            for line in content.splitlines():
                self._remember(line)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer, on disk before anybody sees it. Raises `DataError` where it cannot be written."""
        line = json.dumps({"key": key, "answer": answer})
        with self._lock, writing(self.directory):
            if self._file is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                name = f"{os.getpid()}-{uuid.uuid4().hex}.jsonl"
                self._file = open(self.directory / name, "w")  # noqa: SIM115 - open as long as we are
            self._file.write(line + "\n")
            self._file.flush()
            self._known[key] = answer

    def _remember(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            self._known[entry["key"]] = entry["answer"]
        except (ValueError, TypeError, KeyError):
            return  # torn


class Asker:
    """Puts questions to an endpoint, `parallel` at a time."""

    def __init__(self, endpoint: Endpoint, cache: AnswerCache, parallel: int) -> None:
        self.endpoint, self.cache, self.parallel = endpoint, cache, parallel
        self._answered = self._unusable = self._given_up = 0
        self._reached = False
        self._first_failure: GaveUp | None = None

    def answers(self, questions: Mapping[str, Question]) -> dict[str, Any]:
        """What each question's key is answered by, or `Unusable` with the reason; what the cache knows is not asked.

        Raises `LeviathanError` with the fix where the endpoint cannot be reached, will not have us, or talks nonsense
        from the start; every answer given until then is in the cache, and this object asks no more.
        """
        found = {key: self.cache[key] for key in questions if key in self.cache}
        pool = ThreadPoolExecutor(self.parallel)
        try:
            keys = {pool.submit(self._ask, key, q): key for key, q in questions.items() if key not in found}
            for future in as_completed(keys):
                found[keys[future]] = answer = future.result()
                self._judge_endpoint(answer)
        except BaseException:
            self.endpoint.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        lost = {key: Unusable(str(answer)) for key, answer in found.items() if isinstance(answer, GaveUp)}
        return found | lost

    def _ask(self, key: str, question: Question) -> Any:
        """The answer, which is then in the cache too, or `Unusable` or `GaveUp` as a value."""
        contents = [question.content]
        if question.reminder is not None:
            contents.append(f"{question.content}\n\n{question.reminder}")
        failure: Exception | None = None
        for content in contents:
            try:
                answer = question.parse(self.endpoint.complete(content, **question.options))
            except Unusable as error:
                failure = error
            except GaveUp as error:
                self._first_failure = self._first_failure or error
                if not self._reached:
                    self.endpoint.stop()  # at once: the other questions would be asked in vain before anybody looks
                return error
            else:
                self._reached = True
                self.cache.add(key, answer)
                return answer
        return failure

    def _judge_endpoint(self, answer: Any) -> None:
        """Stop where nobody answers or most of what comes at first is of no use."""
        where = self.endpoint.shown
        if isinstance(answer, GaveUp):
            self._given_up += 1
            if not self._reached or self._given_up >= GIVEN_UP_IN_A_ROW:
                fix = "start the server or mend scorer.url; if it is only slow, raise scorer.timeout_s or lower"
                raise LeviathanError(f"{where} does not answer ({self._first_failure}): {fix} scorer.concurrency")
            return
        self._reached, self._given_up = True, 0
        if self._answered < FIRST_ANSWERS:
            self._answered += 1
            self._unusable += isinstance(answer, Unusable)
            if self._unusable > FIRST_ANSWERS // 2:
                fix = "is this a chat model's endpoint, and the model able to follow the format?"
                counts = f"{self._unusable} of its first {self._answered} answers are of no use"
                raise LeviathanError(f"{where}: {counts} ({answer}): {fix}")
