"""A model behind an OpenAI-compatible endpoint, asked over the network: what may go wrong there is sorted out here.

A failure is one record's (`Unusable`), the endpoint's for now (retried, then `GaveUp`) or the configuration's
(`LeviathanError`, which no retry would mend).
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from core.errors import ConfigError, LeviathanError
from core.files import sha256_text

LONGEST_BACKOFF_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
"""A server that asks for more is asked again after this."""
LARGEST_ANSWER_BYTES = 4 << 20
"""What is longer is no answer but a server gone wrong."""
_EXCERPT = 200


class Unusable(Exception):
    """An answer that no score can be read from; the text is the reason, in a few words."""


class GaveUp(Exception):
    """No answer after all retries."""


class Endpoint:
    """`url`: the base, with `/v1`. The key is read from the environment variable `key_variable`; without one requests
    carry none, as local servers want it. The key appears in no message and no file. A request ends after `timeout_s`
    whatever the server does, and is repeated up to `retries` times, after `first_wait_s`, twice that and so on, with
    jitter, or after what `Retry-After` asks for.

    Any number of threads may ask; `parallel` is how many connections they have.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str,
        timeout_s: float = 60.0,
        retries: int = 5,
        parallel: int = 8,
        first_wait_s: float = 1.0,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self.model, self.key_variable = model, key_variable
        self.timeout_s, self.retries, self.first_wait_s = timeout_s, retries, first_wait_s
        self._stopped = threading.Event()
        self._pause = self._stopped.wait if pause is None else pause
        self._address, self.shown = _address(url)
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError("key_variable", key_variable, "the key in it has characters that no header can carry")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel)
        self._client = httpx.Client(headers=headers, timeout=timeout_s, limits=limits)

    def stop(self) -> None:
        """Let those who wait for a retry give up at once."""
        self._stopped.set()

    def complete(self, content: str, **options: Any) -> str:
        """The model's answer to one message of the user's; `options` go into the request (`temperature`, `seed`).

        Raises `Unusable`, `GaveUp`, or `LeviathanError` where the endpoint will not have us at all.
        """
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": self.model, "messages": messages, **options}).encode()
        failure = ""
        for attempt in range(self.retries + 1):
            if self._stopped.is_set():
                raise GaveUp("stopped")
            wait_s = None
            try:
                response, answer = self._post(body)
                if not (response.status_code == 429 or response.status_code >= 500):
                    return self._content(response.status_code, answer)
                failure, wait_s = f"HTTP {response.status_code}", _retry_after_s(response)
            except httpx.TimeoutException:
                failure = f"no whole answer in {self.timeout_s:g} s"
            except httpx.HTTPError as error:
                failure = self._redacted(str(error) or type(error).__name__)
            if attempt < self.retries:
                self._pause(self._backoff_s(body, attempt) if wait_s is None else wait_s)
        raise GaveUp(f"{failure}, {self.retries + 1} times")

    def _post(self, body: bytes) -> tuple[httpx.Response, bytes]:
        """Response and content. httpx limits each read; the deadline is for a server that sends a byte a minute."""
        deadline = time.monotonic() + self.timeout_s
        headers = {"Content-Type": "application/json"}
        answer = bytearray()
        with self._client.stream("POST", self._address, content=body, headers=headers) as response:
            for piece in response.iter_bytes():
                answer += piece
                if len(answer) > LARGEST_ANSWER_BYTES:
                    raise Unusable(f"an answer of more than {LARGEST_ANSWER_BYTES >> 20} MiB")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("deadline")
        return response, bytes(answer)

    def _content(self, status: int, answer: bytes) -> str:
        """The text in a chat completion."""
        excerpt = self._redacted(" ".join(answer[: 4 * _EXCERPT].decode(errors="replace").split()))[:_EXCERPT]
        if status in (401, 403):
            what = f"refuses the key in {self.key_variable}" if self._key else f"wants a key: set {self.key_variable}"
            raise LeviathanError(f"{self.shown} {what} (HTTP {status})")
        if status == 404:
            fix = "check scorer.url (its base ends in /v1 as a rule) and scorer.judge"
            raise LeviathanError(f"{self.shown} knows no such address or no model {self.model!r}: {fix} ({excerpt})")
        if status != 200:
            raise Unusable(f"HTTP {status}: {excerpt}")
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            raise Unusable(f"no chat completion: {excerpt or 'nothing'}") from None
        if not isinstance(content, str):
            raise Unusable("a message without text")
        return content

    def _backoff_s(self, body: bytes, attempt: int) -> float:
        """Exponential, times 0.5 to 1 by a hash of the request: the waits differ, and are the same in every run."""
        lot = int(sha256_text(body.hex(), str(attempt))[:8], 16) / 2**32
        return min(self.first_wait_s * 2**attempt, LONGEST_BACKOFF_S) * (0.5 + lot / 2)

    def _redacted(self, text: str) -> str:
        """Servers repeat what they were sent."""
        return text.replace(self._key, "[key]") if self._key else text


def _address(url: str) -> tuple[httpx.URL, str]:
    """Where completions are asked for, and the base as messages show it: without a password."""
    try:
        base = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError("url", None, f"is no URL ({error})", ["http://localhost:8000/v1"]) from None
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigError("url", str(base.copy_with(userinfo=b"")), "is no http URL", ["http://localhost:8000/v1"])
    address = base.copy_with(path=base.path.rstrip("/") + "/chat/completions")
    return address, str(base.copy_with(userinfo=b"", query=None))


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds that the header asks for, as a number or a date (RFC 9110, 10.2.3); None where it says nothing."""
    text = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(text) if text[:1].isdigit() else _until_s(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S) if math.isfinite(seconds) else None


def _until_s(date: str) -> float:
    when = parsedate_to_datetime(date)
    return ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
