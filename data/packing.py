"""Documents put whole into rows: best fit, decreasing, over a bounded part of the stream.

Greedy rows cut every document that lies where one ends: the model then reads ends without their begins. Here a document
is put into the fullest row that still has room for it, the longest first, and EOS fills what is left (Ding et al. 2024,
arXiv 2404.10830, section 3). Only what is longer than a row is cut: into whole rows, and a rest that is packed.

Rows are made of the one stream of a source before any rank sees it, so they are the same for any number of ranks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BUFFER_TOKENS = 1 << 23
"""Packed at once, or `BUFFER_ROWS` if these are more. 32 MB."""
BUFFER_ROWS = 16


@dataclass(frozen=True)
class DocumentPiece:
    """A document or a part of one: BOS, tokens, and EOS where the document ends. `name`: of the document."""

    ids: NDArray[np.int32]
    name: str | None


@dataclass
class PackedSequence:
    """Pieces that are read as one row; `space`: tokens that are still free."""

    space: int
    pieces: list[DocumentPiece] = field(default_factory=list)


class Packer:
    """Takes documents and gives rows of `row_tokens` at most, each of which begins with BOS.

    `add` and `close` return the rows that are done. A buffer that is full gives up the fuller half of its rows; the
    pieces of the others wait for what fits them better.
    """

    def __init__(self, row_tokens: int, bos_id: int, eos_id: int, buffer_tokens: int | None = None) -> None:
        self.row_tokens, self.bos_id, self.eos_id = row_tokens, bos_id, eos_id
        self.buffer_tokens = buffer_tokens or max(BUFFER_TOKENS, BUFFER_ROWS * row_tokens)
        self._waiting: list[DocumentPiece] = []
        self._tokens = 0

    def add(self, ids: Sequence[int], name: str | None = None) -> tuple[bool, list[PackedSequence]]:
        """Whether a document (its tokens without BOS and EOS) had to be cut, and the rows that are done."""
        pieces = list(self._cut(ids, name))
        self._waiting += pieces
        self._tokens += sum(len(piece.ids) for piece in pieces)
        return len(pieces) > 1, self._give(keep=True) if self._tokens >= self.buffer_tokens else []

    def close(self) -> list[PackedSequence]:
        """All that is left."""
        return self._give(keep=False)

    def _cut(self, ids: Sequence[int], name: str | None) -> Iterator[DocumentPiece]:
        """Whole rows, then the rest; each begins with BOS, or it would be read as part of what lies before it."""
        room, rest = self.row_tokens - 1, np.asarray([*ids, self.eos_id], np.int32)
        bos = np.array([self.bos_id], np.int32)
        while len(rest) > room:
            yield DocumentPiece(np.concatenate([bos, rest[:room]]), name)
            rest = rest[room:]
            if len(rest) == 1:  # EOS by itself would be a document without text
                return
        yield DocumentPiece(np.concatenate([bos, rest]), name)

    def _give(self, keep: bool) -> list[PackedSequence]:
        rows = best_fit(self._waiting, self.row_tokens)
        rows.sort(key=lambda row: row.space)
        kept = len(rows) // 2 if keep else 0
        given, waiting = rows[: len(rows) - kept], rows[len(rows) - kept :]
        self._waiting = [piece for row in waiting for piece in row.pieces]
        self._tokens = sum(len(piece.ids) for piece in self._waiting)
        return given


def best_fit(pieces: Sequence[DocumentPiece], row_tokens: int) -> list[PackedSequence]:
    """Every piece in a row: longest first, each into the fullest row with room for it. None is longer than a row."""
    rows: list[PackedSequence] = []
    open_rows: list[tuple[int, int]] = []  # space and number of every row that is not full, ascending
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        size = len(piece.ids)
        place = bisect_left(open_rows, (size, -1))
        if place < len(open_rows):
            number = open_rows.pop(place)[1]
        else:
            number = len(rows)
            rows.append(PackedSequence(row_tokens))
        row = rows[number]
        row.pieces.append(piece)
        row.space -= size
        if row.space:
            insort(open_rows, (row.space, number))
    return rows
