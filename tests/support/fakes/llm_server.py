"""A local chat endpoint. A test sets its replies, and it records its requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret"
Reply = tuple[int, dict[str, str], bytes]
"""Status (0: close the connection without a reply), headers and content. Also closed if `Content-Length` is wrong."""


def completion(content: Any) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def graded(grade: int) -> Reply:
    return completion(json.dumps({"grade": grade}))


class Server:
    """`reply` is a function of the request's body and of the number of earlier requests with the same content."""

    def __init__(self, port: int = 0) -> None:
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda body, turn: graded(3)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.latency_s = 0.0
        self._turns: dict[str, int] = {}
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hung up
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, body: dict[str, Any], path: str, headers: dict[str, str]) -> Reply:
        text = body["messages"][0]["content"]
        with self._lock:
            self.requests.append(body | {"path": path})
            self.headers.append(headers)
            turn = self._turns[text] = self._turns.get(text, -1) + 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.latency_s)
        with self._lock:
            self.at_once -= 1
        return self.reply(body, turn)

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, content = server.answer(body, self.path, dict(self.headers))
                if status == 0:  # no reply
                    self.close_connection = True
                    return
                headers = {"Content-Length": str(len(content)), **headers}
                self.close_connection |= headers["Content-Length"] != str(len(content))
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # the client has gone

            def log_message(self, *arguments: Any) -> None:
                return

        return Handler


class Pauses(list[float]):
    """Records the seconds to wait instead of waiting."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)
