"""Headless Chromium in the sandbox, driven by the DevTools protocol over a pipe.

Time in a page is virtual and passes in `advance` only: a stopwatch shows the same on a busy machine. `Math.random` is
seeded. What is read from a page is read in an isolated world, whose builtins the page cannot replace.
Protocol: https://chromedevtools.github.io/devtools-protocol/, messages of JSON that end with a zero byte.
"""

from __future__ import annotations

import json
import os
import selectors
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from core.errors import printable
from core.files import parse_json
from train.exam.code.sandbox import Limits, Running, Sandbox, SandboxError, needed

PAGE_LIMITS = Limits(
    wall_s=60,
    cpu_s=20,
    memory_mib=1536,
    address_space_mib=None,
    processes=256,
    file_mib=64,
    folder_mib=128,
    output_bytes=2**20,
    open_files=512,
)
LONGEST_MESSAGE, MOST_ERRORS = 8 * 2**20, 20
_OPTIONS = [
    "--no-sandbox",  # bubblewrap is the sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-crash-reporter",
    "--no-zygote",
    "--remote-debugging-pipe",
    "--user-data-dir=/work/profile",
]
_PIPES = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'  # Chromium reads commands from 3 and answers on 4
# frames come from a timer, so that they follow virtual time; the generator is Park and Miller's
_SETUP = """
window.requestAnimationFrame = call => setTimeout(() => call(performance.now()), 16);
window.cancelAnimationFrame = clearTimeout;
{ let state = 1; Math.random = () => (state = state * 48271 % 2147483647) / 2147483647; }
"""
_PASS = "pauseIfNetworkFetchesPending"
"""How virtual time passes: it waits for files that load, such as pictures in data URLs."""
_KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13}


class PageError(Exception):
    """The page did not do what was asked for: a fault of whoever wrote it."""


class Page:
    """A page that is open in the browser. Its methods raise `PageError`, also when a limit ends the browser."""

    def __init__(self, running: Running) -> None:
        self.errors: list[str] = []
        """Exceptions that no script of the page caught, at most `MOST_ERRORS`."""
        self._running, self._pending, self._answers = running, bytearray(), {}
        self._last_id, self._session, self._world = 0, "", 0
        self._loaded, self._expired = False, 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(_pipe(running.stdout), selectors.EVENT_READ)

    _answers: dict[int, dict[str, Any]]

    def open(self, address: str) -> None:
        """Load a page. No virtual time passes meanwhile but milliseconds."""
        target = self._send("Target.getTargets")["targetInfos"][0]["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Page", "Inspector"):
            self._send(f"{domain}.enable")
        self._send("Page.addScriptToEvaluateOnNewDocument", source=_SETUP)
        self._send("Emulation.setVirtualTimePolicy", policy="pause")
        self._loaded = False
        self._send("Page.navigate", url=address)
        longest_s = self._running.limits.wall_s / 2
        end = time.monotonic() + longest_s
        while not self._loaded:
            if time.monotonic() > end:
                raise PageError(f"did not load within {longest_s:g} s")
            self._receive(0.005)
            self.advance(1)
        self._world = self._send("Page.createIsolatedWorld", frameId=target)["executionContextId"]

    def advance(self, milliseconds: float) -> None:
        """Let virtual time pass: timers and frames run, as fast as the machine can."""
        before = self._expired
        self._send("Emulation.setVirtualTimePolicy", policy=_PASS, budget=milliseconds)
        while self._expired == before:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, evaluated beside the page's own scripts."""
        answer = self._send("Runtime.evaluate", expression=expression, contextId=self._world, returnByValue=True)
        if "exceptionDetails" in answer:
            raise PageError(f"cannot be examined: {_message(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def text(self, id: str) -> str:
        """Return what the element with this id shows, or the content of an input."""
        found = self.evaluate(f"(e => e ? (e.value ?? e.textContent ?? '').trim() : null)({_element(id)})")
        self.expect(isinstance(found, str), f"has no element with the id {id}")
        return str(found)[:10_000]

    def press(self, key: str) -> None:
        """Press and release a key: one character, or a name such as ArrowLeft."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        # the codes of letters and digits are their ASCII; that of "." would be the code of Delete
        code = _KEY_CODES.get(key, ord(key.upper()) if key.isascii() and key.isalnum() and len(key) == 1 else 0)
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self._send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self._send("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, id: str) -> None:
        """Click in the middle of the element with this id."""
        self.click_on(_element(id), f"has no visible element with the id {id}")

    def click_on(self, expression: str, missing: str) -> None:
        """Click in the middle of an element given by an expression. `missing`: the error if there is none."""
        box = self.evaluate(
            f"(e => {{ if (!e) return null; e.scrollIntoView(); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2, b.width * b.height] }})({expression})"
        )
        self.expect(isinstance(box, list) and len(box) == 3 and box[2] > 0, missing)
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def fill(self, id: str, text: str) -> None:
        """Replace the content of an input by typing."""
        self.click(id)
        self.evaluate(f"{_element(id)}.select?.()")
        self._send("Input.dispatchKeyEvent", type="keyDown", key="Delete", code="Delete", windowsVirtualKeyCode=46)
        for character in text:
            self.press(character)

    @staticmethod
    def expect(condition: bool, otherwise: str) -> None:
        if not condition:
            raise PageError(otherwise)

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write(message)
        while self._last_id not in self._answers:
            self._receive()
        answer = self._answers.pop(self._last_id)
        if "error" in answer:
            raise PageError(f"left its address or cannot be driven: {str(answer['error'].get('message'))[:200]}")
        return dict(answer["result"])

    def _write(self, message: dict[str, Any]) -> None:
        try:
            os.write(_pipe(self._running.stdin), json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            self._ended()

    def _receive(self, timeout_s: float | None = None) -> None:
        """Handle the messages that arrive. The sandbox's wall time ends an endless wait: the pipe closes."""
        if not self._selector.select(timeout_s):
            return
        block = os.read(_pipe(self._running.stdout), 2**16)
        if not block:
            self._ended()
        self._pending += block
        *messages, rest = self._pending.split(b"\0") if b"\0" in block else [self._pending]
        self._pending = bytearray(rest)
        if len(rest) > LONGEST_MESSAGE:
            raise PageError("says more than the browser may pass on")
        for message in messages:
            self._handle(parse_json(bytes(message)))

    def _handle(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case None:
                self._answers[message["id"]] = message
            case "Page.loadEventFired":
                self._loaded = True
            case "Emulation.virtualTimeBudgetExpired":
                self._expired += 1
            case "Runtime.exceptionThrown" if len(self.errors) < MOST_ERRORS:
                self.errors.append(_message(parameters["exceptionDetails"]))
            case "Page.javascriptDialogOpening":  # nobody waits for an answer to this command
                self._last_id += 1
                closing: dict[str, Any] = {"method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                closing |= {"id": self._last_id, "sessionId": self._session}
                self._write(closing)
            case "Inspector.targetCrashed":
                raise PageError("crashed the browser")

    def _ended(self) -> None:
        """Raise what ended the browser."""
        result = self._running.finish()
        if result.limit is None:
            raise SandboxError(f"the browser ended: {result.stderr[-300:].decode(errors='replace')}")
        raise PageError(f"was ended at its limit of {result.limit.value}")


class Browser:
    """Opens pages, each in a new browser in a new sandbox. Raises `ConfigError` if one of them is not installed."""

    def __init__(self, limits: Limits = PAGE_LIMITS) -> None:
        self.sandbox = Sandbox(limits)
        self.program = needed("chromium-headless-shell", "chromium-headless-shell")

    @contextmanager
    def opened(self, html: str) -> Iterator[Page]:
        """Yield a page made of a file's text."""
        command = ["/bin/sh", "-c", _PIPES, "sh", self.program, *_OPTIONS, "about:blank"]
        with self.sandbox.start(command, {"/page.html": html.encode(errors="replace")}) as running:
            page = Page(running)
            page.open("file:///page.html")
            yield page


def _element(id: str) -> str:
    return f"document.getElementById({json.dumps(id)})"


def _message(details: dict[str, Any]) -> str:
    """Return the first line of an exception of JavaScript."""
    text = details.get("exception", {}).get("description") or details.get("text", "")
    return printable(str(text).split("\n")[0][:200])


def _pipe(stream: Any) -> int:
    return int(stream.fileno())
