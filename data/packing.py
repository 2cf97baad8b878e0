"""Pack whole documents into sequences by best-fit decreasing, over a bounded buffer of documents.

Greedy packing cuts every document that crosses the end of a sequence, so the model reads endings without beginnings.
Best fit puts each document, longest first, into the fullest sequence with space for it (Ding et al. 2024, arXiv
2404.10830, section 3); EOS fills the rest. Only documents longer than a sequence are cut: into full sequences and a
remainder, which is packed. A source is packed once, before any rank reads it, so packing does not depend on the layout.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BUFFER_TOKENS = 1 << 23
"""Number of tokens that the buffer holds (32 MB). It holds at least `BUFFER_SEQUENCES` sequences."""
BUFFER_SEQUENCES = 16


@dataclass(frozen=True)
class DocumentPiece:
    """A document or a part of one: BOS, tokens, and EOS if the document ends here. `name`: the document's name."""

    ids: NDArray[np.int32]
    name: str | None


@dataclass
class PackedSequence:
    """Pieces that are read as one sequence; `space`: number of tokens that are still free."""

    space: int
    pieces: list[DocumentPiece] = field(default_factory=list)


class Packer:
    """Take documents, and return packed sequences of at most `seq_len` tokens. Each begins with BOS.

    When the buffer is full, the fuller half of its sequences is returned. Pieces of the other half are packed again.
    """

    def __init__(self, seq_len: int, bos_id: int, eos_id: int, buffer_tokens: int | None = None) -> None:
        self.seq_len, self.bos_id, self.eos_id = seq_len, bos_id, eos_id
        self.buffer_tokens = buffer_tokens or max(BUFFER_TOKENS, BUFFER_SEQUENCES * seq_len)
        self._waiting: list[DocumentPiece] = []
        self._tokens = 0

    def add(self, ids: Sequence[int], name: str | None = None) -> tuple[bool, list[PackedSequence]]:
        """Add a document (without BOS and EOS). Return whether it was cut, and the sequences that are finished."""
        pieces = list(self._cut(ids, name))
        self._waiting += pieces
        self._tokens += sum(len(piece.ids) for piece in pieces)
        return len(pieces) > 1, self._flush(keep_half=True) if self._tokens >= self.buffer_tokens else []

    def close(self) -> list[PackedSequence]:
        """Return the sequences that are left."""
        return self._flush(keep_half=False)

    def _cut(self, ids: Sequence[int], name: str | None) -> Iterator[DocumentPiece]:
        """Yield pieces of `seq_len` tokens, then the rest. Each begins with BOS, or it would continue another piece."""
        space, rest = self.seq_len - 1, np.asarray([*ids, self.eos_id], np.int32)
        bos = np.array([self.bos_id], np.int32)
        while len(rest) > space:
            yield DocumentPiece(np.concatenate([bos, rest[:space]]), name)
            rest = rest[space:]
            if len(rest) == 1:  # EOS by itself would be a document without text
                return
        yield DocumentPiece(np.concatenate([bos, rest]), name)

    def _flush(self, keep_half: bool) -> list[PackedSequence]:
        sequences = best_fit(self._waiting, self.seq_len)
        sequences.sort(key=lambda sequence: sequence.space)
        done = len(sequences) - (len(sequences) // 2 if keep_half else 0)
        self._waiting = [piece for sequence in sequences[done:] for piece in sequence.pieces]
        self._tokens = sum(len(piece.ids) for piece in self._waiting)
        return sequences[:done]


def best_fit(pieces: Sequence[DocumentPiece], seq_len: int) -> list[PackedSequence]:
    """Put every piece, longest first, into the fullest sequence with space for it. No piece exceeds `seq_len`."""
    sequences: list[PackedSequence] = []
    free: list[tuple[int, int]] = []  # space and number of every sequence that is not full, ascending
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        size = len(piece.ids)
        place = bisect_left(free, (size, -1))
        if place < len(free):
            number = free.pop(place)[1]
        else:
            number = len(sequences)
            sequences.append(PackedSequence(seq_len))
        sequence = sequences[number]
        sequence.pieces.append(piece)
        sequence.space -= size
        if sequence.space:
            insort(free, (sequence.space, number))
    return sequences
