"""What runs in the sandboxes of a program: the program in one, its tests in another.

`python harness.py program` runs untrusted code and calls its function for the tests. `python harness.py tests` runs the
tests. Each line on their channel is JSON. The tests see plain data only: whatever the program overrides, it overrides
in its own process, and the verdict comes from the other. Only the standard library is used, of any Python from 3.9.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
from collections.abc import Callable
from typing import Any

LONGEST_LINE = 2**22
"""Characters of an answer to one call."""
_KINDS: dict[str, Callable[[Any], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict,
}  # fmt: skip


def encode(value: Any) -> Any:
    """Return a value as JSON: scalars as they are, others as [kind, content]. Raises `TypeError` for other types."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(one)] for key, one in value.items()]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    for name, kind in _KINDS.items():
        if isinstance(value, kind):  # type: ignore[arg-type]
            return [name, [encode(one) for one in value]]
    raise TypeError(f"a value of type {type(value).__name__} cannot be compared")


def decode(stored: Any) -> Any:
    if not isinstance(stored, list):
        return stored
    kind, content = stored
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {decode(key): decode(one) for key, one in content}
    return _KINDS[kind](decode(one) for one in content)


def parsable(code: str) -> str:
    """Return the longest beginning of whole lines that is a program: a model may go on in prose."""
    lines = code.splitlines()
    for end in range(len(lines), max(0, len(lines) - 200), -1):
        beginning = "\n".join(lines[:end]) + "\n"
        try:
            ast.parse(beginning)
        except (SyntaxError, ValueError):
            continue
        return beginning
    return code


def serve(code: str, entry_point: str, receive: Any, send: Any) -> None:
    """Run a program and answer calls of its function until the channel closes."""

    def say(*message: Any) -> None:
        send.write(json.dumps(message) + "\n")
        send.flush()

    space: dict[str, Any] = {"__name__": "answer"}
    try:
        exec(compile(parsable(code), "answer.py", "exec"), space)
        function = space[entry_point]
    except BaseException as error:  # also SystemExit
        say("failed", type(error).__name__, str(error)[:200])
        return
    say("ready")
    for line in receive:
        arguments, named = json.loads(line)
        try:
            value = function(*decode(arguments), **decode(named))
            reply = ["value", encode(value)]
        except BaseException as error:
            reply = ["raised", type(error).__name__, str(error)[:200]]
        say(*reply)


class Remote:
    """The function of the program, as the tests call it."""

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive, self._send = receive, send

    def hear(self) -> list[Any]:
        line = self._receive.readline(LONGEST_LINE)
        if not line.endswith("\n"):
            raise EndedError("the program ended early or returned too much")
        try:
            message = json.loads(line)
        except RecursionError:
            raise EndedError("the program returned a value that is nested too deeply") from None
        if not isinstance(message, list) or not message or message[0] not in ("ready", "failed", "value", "raised"):
            raise EndedError("the program wrote to the channel of its tests")
        return message

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        try:
            self._send.write(json.dumps([encode(arguments), encode(named)]) + "\n")
            self._send.flush()
        except BrokenPipeError:
            raise EndedError("the program ended early") from None
        kind, *content = self.hear()
        if kind == "value":
            return decode(content[0])
        name, text = map(str, content)
        wanted = getattr(builtins, name, None)
        if not (isinstance(wanted, type) and issubclass(wanted, Exception)):
            raise EndedError(f"{name}: {text}")
        try:
            error: Exception = wanted(text)
        except TypeError:  # UnicodeDecodeError and its like want more
            error = Exception(f"{name}: {text}")
        raise error


class EndedError(BaseException):
    """The program cannot go on. Tests that expect an exception do not catch it."""


def examine(prompt: str, test: str, receive: Any, send: Any) -> str:
    """Return an empty string if the program passes the tests, or why not."""
    remote = Remote(receive, send)
    try:
        kind, *content = remote.hear()
        if kind != "ready":
            return " ".join(map(str, content))
        space: dict[str, Any] = {"__name__": "tests"}
        try:
            exec(compile(prompt, "prompt.py", "exec"), space)  # tests may use other functions of the prompt
        except SyntaxError:  # a prompt may end in the middle of a function
            space = {"__name__": "tests"}
        exec(compile(test, "tests.py", "exec"), space)
        space["check"](remote)
    except EndedError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")
    return ""


def main(role: str) -> None:
    """Take the channel from stdin and stdout, so that what the code prints goes nowhere."""
    if hasattr(sys, "set_int_max_str_digits"):  # Python 3.11 and patches of older versions
        sys.set_int_max_str_digits(0)
    receive, send = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    report = os.fdopen(os.dup(2), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    with open("/task.json", encoding="utf-8") as file:
        task = json.load(file)
    if role == "program":
        serve(task["code"], task["entry_point"], receive, send)
    else:
        json.dump({"failure": examine(task["prompt"], task["test"], receive, send)}, report)
        report.flush()


if __name__ == "__main__":
    main(sys.argv[1])
