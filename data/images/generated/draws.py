"""Random whole numbers from a hash: the same on every machine and in every version of Python."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from itertools import count


class Draws:
    """An endless sequence of numbers that depends on `parts` alone."""

    def __init__(self, *parts: object) -> None:
        self._words = _words("\x1f".join(map(str, parts)))

    def below(self, end: int) -> int:
        """Return a number in [0, end), each equally likely to within end / 2**32."""
        return next(self._words) * end >> 32

    def between(self, first: int, last: int) -> int:
        """Return a number in [first, last]."""
        return first + self.below(last - first + 1)


def _words(text: str) -> Iterator[int]:
    for block in count():
        yield from struct.unpack("<16I", hashlib.sha512(f"{text}\x1f{block}".encode()).digest())
