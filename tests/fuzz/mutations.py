"""Damage valid files in the ways that disks, networks and strangers do, and check that a parser bears it.

A parser must return a value or raise an error of ours whose message is one line: no other exception, no endless loop, no
memory that a few bytes can make it use.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import math
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st

T = TypeVar("T")
FEWER = settings(max_examples=settings().max_examples // 3)
"""For tests that take a tenth of a second for each example."""
LONGEST_S, MOST_MIB, LONGEST_MESSAGE = 10.0, 512, 4000

HOSTILE = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**53 + 1, 2**62, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1e308, 1e-320, math.nan, math.inf, -math.inf),
    *("", " ", "\0", "\ud800", "a\nb", "\u2028", "\x1b[2J", "\u202e", "${oc.env:HOME}", "${", "???", "NaN", "1e999"),
    *("../../x", "..", ".", "/dev/zero", "a/b", "x" * 5000, "9" * 5000, "\u0661", "\u00b2", "builtin", "os:system"),
    *([], {}, [[]], [None], {"": None}, [0, 0], [-1], [1e9], ["a"], [2**62, 2**62, 2**62], {"text": {}}),
]
FRAGMENTS = [
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\n",
        b"\r",
        b"\x1b[2J",
        b"\xe2\x80\xa8",
        b"\x85",
        b"\t",
        b" ",
    ),
    *(
        b'"',
        b"'",
        b"\\",
        b"\\ud800",
        b"{",
        b"}",
        b"[",
        b"]",
        b"(",
        b")",
        b",",
        b":",
        b"=",
        b"-",
        b"+",
        b"~",
        b"#",
        b"${",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 3000,
        b"null",
        b"true",
        b"&a ",
        b"*a ",
        b"!!",
        b"<<: ",
    ),
]


def text() -> st.SearchStrategy[str]:
    """Text with halves of surrogate pairs, control characters and all else that JSON can escape."""
    return st.text(st.characters(), max_size=8)


def hostile() -> st.SearchStrategy[Any]:
    """Values that a file should not have where it has others."""
    wild = st.sampled_from(HOSTILE) | st.integers() | st.floats() | text()
    return st.one_of(wild, wild, st.lists(wild, max_size=3), st.dictionaries(text(), wild, max_size=2)).map(
        copy.deepcopy
    )


@st.composite
def spoiled(draw: st.DrawFn, tree: T) -> Any:
    """A tree of JSON in which a few values are replaced, removed, doubled or exchanged."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        places = list(_places(root))
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(("replace", "replace", "replace", "remove", "double", "exchange", "rename"))):
            case "remove" if len(root) > 1 or parent is not root:
                del parent[key]
            case "double" if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(parent[key]))
            case "exchange":
                other, place = places[draw(st.integers(0, len(places) - 1))]
                parent[key] = copy.deepcopy(other[place])
            case "rename" if isinstance(parent, dict):
                parent[draw(text())] = parent.pop(key)
            case _:
                parent[key] = draw(hostile())
    return root[0]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that are cut, flipped, doubled or mixed with others."""
    for _ in range(draw(st.sampled_from((1, 1, 2, 4)))):
        begin, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        match draw(st.sampled_from(("cut", "flip", "flip", "insert", "insert", "remove", "double", "replace"))):
            case "cut":
                content = content[:end]
            case "flip" if begin < len(content):
                flipped = content[begin] ^ (1 << draw(st.integers(0, 7)))
                content = content[:begin] + bytes([flipped]) + content[begin + 1 :]
            case "insert":
                content = content[:begin] + draw(st.sampled_from(FRAGMENTS) | st.binary(max_size=8)) + content[begin:]
            case "remove":
                content = content[:begin] + content[min(end, begin + draw(st.integers(1, 16))) :]
            case "double":
                content = content[:end] + content[begin:end] + content[end:]
            case _:
                content = content[:begin] + draw(st.sampled_from(FRAGMENTS)) + content[min(end, begin + 4) :]
    return content


def json_bytes(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def json_files(tree: Any) -> st.SearchStrategy[bytes]:
    """Files like a valid one of JSON: other values in it, other bytes in it, or something else."""
    return st.one_of(spoiled(tree).map(json_bytes), spoiled(tree).map(json_bytes), files(json_bytes(tree)))


def files(content: bytes) -> st.SearchStrategy[bytes]:
    """Files like `content`, and a few that are nothing like it."""
    return st.one_of(damaged(content), damaged(content), damaged(content), st.binary(max_size=64))


def assert_reads_or_refuses(read: Callable[[], T], *errors: type[Exception]) -> T | None:
    """Return what `read` returns, or None if it raises one of `errors` with a message of one line."""
    with _bounded():
        try:
            return read()
        except errors as error:
            message = str(error)
            assert message and message.isprintable(), f"not one line: {message[:500]!r}"
            assert len(message) <= LONGEST_MESSAGE, f"{len(message):,} characters: {message[:500]!r}"
            return None


class Endless(Exception):
    """A parser has not ended in time."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise `Endless` after some seconds of CPU time, since other processes may take the cores. End the process after
    more of the clock, where no Python code runs. Limit the growth of memory.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        old = signal.signal(signal.SIGPROF, _end)
        signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
    faulthandler.dump_traceback_later(6 * LONGEST_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        if in_main:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, old)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert grown < MOST_MIB, f"took {grown} MiB"


def _end(*_: object) -> None:
    raise Endless(f"took more than {LONGEST_S:g} s of CPU time")
