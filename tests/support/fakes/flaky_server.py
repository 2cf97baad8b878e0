"""A chat endpoint that is slow, lies, drops connections, and dies and comes back on the same port. It counts answers."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from typing import Any

from tests.support.fakes.llm_server import Reply, Server, completion, graded

DROPPED: Reply = (0, {}, b"")
LIES = {  # by the model
    "out of range": completion('{"grade": 6}'),
    "text": completion('{"grade": "3"}'),
    "extra text": completion('Sure! {"grade": 3}'),
    "another language": completion("Schwierigkeit: drei von fünf"),
    "two grades": completion('{"grade": 2}{"grade": 4}'),
}
FAULTS = {  # of the server
    "page": (200, {"Content-Type": "text/html"}, b"<html>welcome</html>"),
    "error body": (200, {}, b'{"error": {"message": "overloaded", "code": 503}}'),
    "no text": completion(None),
    "huge": (200, {}, b" " * (5 << 20)),
    "truncated": (200, {"Content-Length": "500"}, b'{"choices": [{"mess'),
    "half JSON": (200, {}, b'{"choices": [{"message": {"content": "{'),
    "wrong encoding": (200, {"Content-Encoding": "gzip"}, b"not gzip"),
    "429": (429, {}, b""),
    "429 later": (429, {"Retry-After": "0.2"}, b"slow down"),
    "500": (500, {}, b"Internal Server Error"),
    "503 later": (503, {"Retry-After": "0.1"}, b""),
    "dropped": DROPPED,
}


class FlakyServer:
    """Answers a share of the requests with a valid grade, which depends on the text, and the others with `LIES` and
    `FAULTS`, at most `patience` in a row for one text. After `lives` requests it dies: it drops all connections, listens no more, and comes back after `down_s`.
    """

    def __init__(
        self, valid: float = 0.6, lives: int = 10**9, down_s: float = 0.1, late_s: float = 0.0, patience: int = 10**9
    ) -> None:
        self.valid, self.lives, self.down_s, self.late_s, self.patience = valid, lives, down_s, late_s, patience
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        """By text: requests, and valid answers that were sent as a whole and in time."""
        self.kinds: Counter[str] = Counter()
        self.repeated: list[str] = []
        """Texts that were requested after they had been answered."""
        self.go = threading.Event()
        self.go.set()
        self.hold_at: int | None = None
        """Number of valid answers after which the server waits for `go` before any further reply."""
        self._chance = random.Random(7)
        self._lock, self._life, self.deaths = threading.Lock(), 0, 0
        self._start(0)

    def _start(self, port: int) -> None:
        self._server = Server(port)
        self._server.reply = lambda body, turn, life=self._life: self._reply(body, life)
        self.url = self._server.url

    def die(self) -> None:
        self._life += 1  # replies of earlier lives are dropped
        self.deaths += 1
        port = self._server.port
        self._server.close()
        time.sleep(self.down_s)
        self._start(port)

    def close(self) -> None:
        self._life += 1
        self.go.set()
        self._server.close()

    def _reply(self, body: dict[str, Any], life: int) -> Reply:
        text = body["messages"][0]["content"].split("=" * 20)[1].strip()  # without the rubric and the reminder
        with self._lock:
            self.asked[text] += 1
            if text in self.answered:
                self.repeated.append(text)
            if sum(self.asked.values()) % self.lives == 0:
                threading.Thread(target=self.die, daemon=True).start()
            kind = self._chance.choices(["valid", "late", "lie", "fault"], self._weights())[0]
            kind = "valid" if self.asked[text] > self.patience else kind
            slow_s = self._chance.uniform(0, 0.02)
            lie, fault = self._chance.choice(list(LIES)), self._chance.choice(list(FAULTS))
        time.sleep(self.late_s if kind == "late" else slow_s)
        with self._lock:
            held = self.hold_at is not None and sum(self.answered.values()) >= self.hold_at
        if held:
            self.go.wait()
        with self._lock:
            if life != self._life:
                kind, fault = "fault", "dropped"
            self.kinds[{"lie": lie, "fault": fault}.get(kind, kind)] += 1
            if kind == "valid":
                self.answered[text] += 1
        return LIES[lie] if kind == "lie" else FAULTS[fault] if kind == "fault" else graded(self.grade(text))

    def _weights(self) -> list[float]:
        rest = 1 - self.valid
        return [self.valid, *([rest / 10, rest * 0.4, rest * 0.5] if self.late_s else [0, rest * 0.4, rest * 0.6])]

    @staticmethod
    def grade(text: str) -> int:
        return 1 + sum(text.encode()) % 5


def answers_in(folder: Any) -> list[str]:
    """Return the keys of all stored answers, in order."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines()]
    return [json.loads(line)["key"] for line in lines]
