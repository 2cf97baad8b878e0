"""Turn texts into features: hashed word n-grams (Weinberger et al. 2009, arXiv 0902.2206), a few figures, and what a
reference model makes of them.

All texts of a batch are one array of bytes, and every step is a few passes over it: about 20 MB/s on one core. The
features of a text do not depend on the others in its batch.
Shapes: N texts, B bytes of all texts, W words, T n-grams of all texts (one entry per text and distinct n-gram), S
features of a reference model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.filter.config import FeatureKind
from data.filter.input.records import Record
from data.filter.score.scorer import TextFeatures

VERSION = "1"
"""Changes whenever the features of a text change."""
BITS = 18
"""Hashed n-grams have 2^BITS buckets."""
TEXT_BYTES = 1 << 16
"""Bytes of a text that are read: of a longer one its beginning."""
FIGURES = (
    "log bytes",
    "log words",
    "log lines",
    "log sentences",
    "digits",
    "capitals",
    "operators",
    "brackets",
    "backslashes",
    "spaces",
    "length of words",
    "distinct words",
    "log numbers",
    "longest number",
)

_KEPT_BYTES = 1 << 26
"""Memory for the features of a reference model that are kept."""
_OTHER, _LETTER, _DIGIT, _SPACE = range(4)
_KIND = np.full(256, _OTHER, np.uint8)
_KIND[[*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1), *range(0x80, 0x100)]] = _LETTER
_KIND[ord("0") : ord("9") + 1] = _DIGIT
_KIND[[*b" \t\n\r\v\f\0"]] = _SPACE
_WIDE = 0xE0
"""First byte of a character of three bytes or more. Each is a word of its own, as Chinese has no spaces."""
_SETS = (b"0123456789", bytes(range(65, 91)), b"+-*/=<>^%&|~", b"()[]{}", b"\\", b" \t\n\r", b"\n", b".?!")
_MEMBER = np.zeros((len(_SETS), 256), np.int64)
for _row, _bytes in enumerate(_SETS):
    _MEMBER[_row, list(_bytes)] = 1
_ODD = 0x9E3779B97F4A7C15
_CHANCE = np.random.Generator(np.random.PCG64(20))
_VALUE = _CHANCE.integers(1, 1 << 63, 256, np.uint64) * np.uint64(2) + np.uint64(1)
_VALUE[65:91] = _VALUE[97:123]  # case does not matter
_VALUE[48:58] = _VALUE[48]  # a number counts by its length


@dataclass(frozen=True)
class Features:
    """`rows_T` [T] in increasing order, `columns_T` [T] below 2^BITS, `counts_T` [T]; `figures_NF` as in `FIGURES`."""

    rows_T: NDArray[np.int64]
    columns_T: NDArray[np.int64]
    counts_T: NDArray[np.float64]
    figures_NF: NDArray[np.float64]


def features_of(texts: Sequence[str]) -> Features:
    """Return the counts of words and pairs of words, and figures, of each text."""
    encoded = [text.encode("utf-8", "replace")[:TEXT_BYTES] for text in texts]
    sizes_N = np.array([len(one) for one in encoded], np.int64)
    bytes_B = np.frombuffer(b"".join(encoded), np.uint8)
    kind_B = _KIND[bytes_B]
    text_B = np.repeat(np.arange(len(texts)), sizes_N)
    starts_B = np.ones(len(bytes_B), bool)
    starts_B[1:] = (kind_B[1:] != kind_B[:-1]) | (text_B[1:] != text_B[:-1])
    starts_B |= (kind_B == _OTHER) | (bytes_B >= _WIDE)
    begin = np.flatnonzero(starts_B)
    end = np.append(begin[1:], len(bytes_B))
    is_word = kind_B[begin] != _SPACE
    begin, end = begin[is_word], end[is_word]
    hash_W, text_W, kind_W = _hashes(bytes_B, begin, end), text_B[begin], kind_B[begin]
    pair = np.flatnonzero(text_W[1:] == text_W[:-1])
    pairs = _mixed(hash_W[pair] * np.uint64(3) + hash_W[pair + 1])
    rows = np.concatenate([text_W, text_W[pair]])
    columns = (np.concatenate([hash_W, pairs]) >> np.uint64(64 - BITS)).astype(np.int64)
    keys = (rows << BITS) + columns
    narrow = np.uint32 if len(texts) < 1 << 32 - BITS else np.int64  # half the bits sort twice as fast
    distinct, counts_T = np.unique(keys.astype(narrow), return_counts=True)
    rows_T, columns_T = np.divmod(distinct.astype(np.int64), 1 << BITS)
    figures_NF = _figures(bytes_B, text_B, sizes_N, text_W, kind_W, end - begin, rows_T)
    return Features(rows_T, columns_T, counts_T.astype(np.float64), figures_NF)


def _hashes(bytes_B: NDArray[np.uint8], begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of each word: a polynomial in its bytes modulo 2^64, from differences of running sums."""
    length = end - begin
    powers = np.cumprod(np.full(length.max(initial=0), _ODD, np.uint64))
    starts = np.cumsum(length) - length
    offsets = np.arange(length.sum()) - np.repeat(starts, length)
    places = np.repeat(begin, length) + offsets
    return _mixed(np.add.reduceat(_VALUE[bytes_B[places]] * powers[offsets], starts))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _figures(
    bytes_B: NDArray[np.uint8],
    text_B: NDArray[np.int64],
    sizes_N: NDArray[np.int64],
    text_W: NDArray[np.int64],
    kind_W: NDArray[np.uint8],
    length_W: NDArray[np.int64],
    text_T: NDArray[np.int64],
) -> NDArray[np.float64]:
    count = len(sizes_N)

    def total(rows: NDArray[np.int64], weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        return np.bincount(rows, weights, count).astype(np.float64)

    of_byte = np.bincount((text_B << 8) + bytes_B, minlength=count << 8).reshape(count, 256)
    digits, capitals, operators, brackets, backslashes, spaces, lines, ends = (of_byte @ _MEMBER.T).T.astype(np.float64)
    size, words, distinct = np.maximum(sizes_N, 1), total(text_W), total(text_T)
    letters, numbers = kind_W == _LETTER, kind_W == _DIGIT
    longest = np.zeros(count)
    np.maximum.at(longest, text_W[numbers], length_W[numbers])
    columns = (
        np.log1p(sizes_N),
        np.log1p(words),
        np.log1p(lines),
        np.log1p(ends),
        digits / size,
        capitals / size,
        operators / size,
        brackets / size,
        backslashes / size,
        spaces / size,
        total(text_W[letters], length_W[letters].astype(float)) / np.maximum(total(text_W[letters]), 1),
        distinct / np.maximum(2 * words, 1),
        np.log1p(total(text_W[numbers])),
        longest,
    )
    return np.stack(columns, 1)


class ReferenceFeatures:
    """Features of records that a reference model computes. `name`: of the model. `fingerprint`: a hash of its weights,
    its tokenizer and all settings on which the features depend.
    """

    def __init__(self, kind: FeatureKind, name: str, read: TextFeatures, fingerprint: str) -> None:
        self.kind, self.name, self.fingerprint = kind, name, fingerprint
        self._read, self._known, self._bytes = read, dict[str, NDArray[np.float32]](), 0
        self._seconds, self._count, self._cut = 0.0, 0, 0

    @property
    def facts(self) -> dict[str, str]:
        """What is stored with a model that learned from the features."""
        return {"features": self.kind.value, "model": self.name, "fingerprint": self.fingerprint}

    def of(self, records: Sequence[Record]) -> NDArray[np.float32]:
        """Return the features [N, S]. Those of the first records are kept: learning reads its sample several times."""
        contents = [record.content for record in records]
        new = {content: one for content, one in zip(contents, records, strict=True) if content not in self._known}
        found = {}
        if new:
            begin = time.perf_counter()
            features_NS, cut = self._read([(record.prompt, record.answer) for record in new.values()])
            self._seconds += time.perf_counter() - begin
            self._count, self._cut = self._count + len(new), self._cut + cut
            found = dict(zip(new, features_NS, strict=True))
            if self._bytes + features_NS.nbytes <= _KEPT_BYTES:
                self._bytes += features_NS.nbytes
                self._known.update(found)
        return np.stack([found[one] if one in found else self._known[one] for one in contents])

    def cost(self, records: int | None = None) -> str:
        """Say in one line how long a record takes, and all `records`, from those read so far."""
        seconds = self._seconds / max(self._count, 1)
        line = f"features of {self.name} ({self.kind.value}): {1e3 * seconds:.2g} ms a record"
        if records is not None:
            line += f", {records * seconds / 60:.1f} min for {records:,} in one process"
        if self._cut:
            line += f"; {self._cut:,} of {self._count:,} records are longer than what the model reads, and are cut"
        return line
