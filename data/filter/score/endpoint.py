"""A client for a model behind an OpenAI-compatible endpoint.

Three kinds of failure are distinguished: a rejected request (`UnusableAnswer`), no chat completion at the moment
(retried, then `RetriesExhausted`), and a wrong configuration (`LeviathanError`, which no retry would fix).
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from email.utils import mktime_tz, parsedate_tz
from typing import Any

import httpx

from core.errors import ConfigError, LeviathanError, OneLineError, printable
from core.files import sha256_text

LONGEST_BACKOFF_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
LARGEST_ANSWER_BYTES = 4 << 20
NO_COMPLETION = "not a chat completion"
_EXCERPT = 200
_RETRIED = (408, 425, 429)
"""Statuses below 500 after which a request may be repeated: timeout, too early, too many requests."""


class UnusableAnswer(OneLineError):
    """No score can be read from an answer. The message is a short reason."""


class RetriesExhausted(UnusableAnswer):
    """No answer after all retries."""


class Endpoint:
    """Request chat completions. `url` is the base URL, with `/v1`. The environment variable `key_variable` has the API
    key; if it is not set, requests carry no key, as local servers expect. No message and no file contains the key. A
    request without a chat completion after `timeout_s` fails. A failed request is repeated up to `retries` times, after
    1 s, 2 s, 4 s and so on, with jitter, or after the server's `Retry-After`.

    Thread-safe. Each thread has a connection.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str,
        timeout_s: float = 60.0,
        retries: int = 5,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self.model, self.key_variable = model, key_variable
        self.timeout_s, self.retries = timeout_s, retries
        self.stopped = threading.Event()
        """Once set, no request is repeated and all waits for a retry end."""
        self.reached, self.first_failure = False, ""
        self.trouble = ""
        """Why the last request failed, for a line of progress; empty if it succeeded."""
        self._pause = self.stopped.wait if pause is None else pause
        self._address, self.shown = _address(url)
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError("key_variable", key_variable, "holds a key with characters that a header cannot carry")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout_s, limits=httpx.Limits())

    def complete(self, content: str, **options: Any) -> str:
        """Return the model's answer to one user message. `options`, such as `temperature`, are added to the request.

        Raises `UnusableAnswer` if the request is rejected, `RetriesExhausted`, or `LeviathanError` if the key or the
        model is. If the endpoint never answered, no further request is sent.
        """
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": self.model, "messages": messages, **options}).encode()
        failure = ""
        for attempt in range(self.retries + 1):
            if self.stopped.is_set():
                raise RetriesExhausted("stopped")
            wait_s = None
            try:
                response, answer = self._post(body)
                if not (response.status_code in _RETRIED or response.status_code >= 500):
                    content = self._content(response.status_code, answer)
                    self.trouble, self.reached = "", True
                    return content
                failure, wait_s = f"HTTP {response.status_code}", _retry_after_s(response)
            except httpx.TimeoutException:
                failure = f"no complete answer in {self.timeout_s:g} s"
            except httpx.HTTPError as error:
                failure = self._redacted(str(error) or type(error).__name__)
            if attempt < self.retries:
                if wait_s is None:  # the jitter is a hash, so that it differs between requests and not between runs
                    jitter = int(sha256_text(body.hex(), str(attempt))[:8], 16) / 2**32
                    wait_s = min(2.0**attempt, LONGEST_BACKOFF_S) * (0.5 + jitter / 2)
                self.trouble = f"; {failure}, tried again after {wait_s:.0f} s"
                self._pause(wait_s)
        self.first_failure = self.first_failure or f"{failure}, {self.retries + 1} attempts"
        if not self.reached:
            self.stopped.set()  # other requests would fail too
        raise RetriesExhausted(f"{failure}, {self.retries + 1} attempts")

    def _post(self, body: bytes) -> tuple[httpx.Response, bytes]:
        """Return the response and its content. httpx limits the time of each read, the deadline that of all reads."""
        deadline = time.monotonic() + self.timeout_s
        headers = {"Content-Type": "application/json"}
        answer = bytearray()
        with self._client.stream("POST", self._address, content=body, headers=headers) as response:
            for chunk in response.iter_bytes():
                answer += chunk
                if len(answer) > LARGEST_ANSWER_BYTES:
                    raise httpx.DecodingError(f"answer larger than {LARGEST_ANSWER_BYTES >> 20} MiB")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("deadline")
        return response, bytes(answer)

    def _content(self, status: int, answer: bytes) -> str:
        """Return the text of a chat completion."""
        excerpt = self._redacted(printable(answer[: 4 * _EXCERPT].decode(errors="replace")))[:_EXCERPT]
        if status in (401, 403):
            what = "rejects the key in" if self._key else "requires a key: set"
            raise LeviathanError(f"{self.shown} {what} {self.key_variable} (HTTP {status})")
        if status == 404:
            fix = "check scorer.url (usually ends in /v1) and scorer.judge"
            raise LeviathanError(f"{self.shown} has no such address or no model {self.model!r}: {fix} ({excerpt})")
        if status != 200:
            raise UnusableAnswer(f"HTTP {status}: {excerpt}")
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
            return str.encode(content, errors="replace").decode()  # lone surrogates cannot be stored
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            raise httpx.DecodingError(f"{NO_COMPLETION}: {excerpt or 'empty'}") from None

    def _redacted(self, text: str) -> str:
        """Remove the key from a message, since servers may echo the request."""
        return text.replace(self._key, "[key]") if self._key else text


def _address(url: str) -> tuple[httpx.URL, str]:
    """Return the address for chat completions, and the base URL without credentials, for messages."""
    try:
        base = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError("url", None, f"is not a URL ({error})", ["http://localhost:8000/v1"]) from None
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigError("url", str(base.copy_with(userinfo=b"")), "is not an http URL", ["http://localhost:8000/v1"])
    address = base.copy_with(path=base.path.rstrip("/") + "/chat/completions")
    return address, str(base.copy_with(userinfo=b"", query=None))


def _retry_after_s(response: httpx.Response) -> float | None:
    """Return the seconds in `Retry-After`, a number or a date (RFC 9110, 10.2.3); None if it cannot be read."""
    text = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(text) if text[:1].isdigit() else mktime_tz(parsedate_tz(text)) - time.time()  # type: ignore
    except (ValueError, TypeError, OverflowError):  # TypeError: no date
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S) if math.isfinite(seconds) else None
