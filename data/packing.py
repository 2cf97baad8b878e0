"""Pack whole documents into sequences by best-fit decreasing, over a bounded buffer of documents.

Greedy packing cuts every document that crosses the end of a sequence, so the model reads endings without beginnings.
Best fit puts each document, longest first, into the fullest sequence with space for it (Ding et al. 2024, arXiv
2404.10830, section 3); EOS fills the rest. Only documents longer than a sequence are cut: into full sequences and a
remainder, which is packed. A source is packed once, before any rank reads it, so packing does not depend on the layout.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.images.media import EncodedPicture
from data.images.store import StoredPicture

BUFFER_TOKENS = 1 << 23
"""Number of tokens that the buffer holds (32 MB). It holds at least `BUFFER_SEQUENCES` sequences."""
BUFFER_SEQUENCES = 16


@dataclass(frozen=True)
class PlacedPicture:
    """A picture whose tokens begin at `start` of a document or piece."""

    start: int
    picture: StoredPicture


@dataclass(frozen=True)
class DocumentPiece:
    """A document or a part of one: BOS, tokens, and EOS if the document ends here. `name`: the document's name.
    `pictures`: its pictures, with their places in `ids`.
    """

    ids: NDArray[np.int32]
    name: str | None
    pictures: tuple[PlacedPicture, ...] = ()


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
        self.waiting_tokens = 0

    def add(
        self, ids: Sequence[int], name: str | None = None, pictures: Sequence[PlacedPicture] = ()
    ) -> tuple[bool, list[PackedSequence]]:
        """Add a document (without BOS and EOS). Return whether it was cut, and the sequences that are finished. No
        picture is cut; each takes less than a sequence.
        """
        pieces = list(self._cut(ids, name, pictures))
        self._waiting += pieces
        self.waiting_tokens += sum(len(piece.ids) for piece in pieces)
        return len(pieces) > 1, self._flush(keep_half=True) if self.waiting_tokens >= self.buffer_tokens else []

    def close(self) -> list[PackedSequence]:
        """Return the sequences that are left."""
        return self._flush(keep_half=False)

    def _cut(self, ids: Sequence[int], name: str | None, pictures: Sequence[PlacedPicture]) -> Iterator[DocumentPiece]:
        """Yield pieces of at most `seq_len` tokens: full, unless a picture would be cut. Each begins with BOS, or it
        would continue another piece.
        """
        whole, begin = np.asarray([*ids, self.eos_id], np.int32), 0
        while begin < len(whole):
            end = min(begin + self.seq_len - 1, len(whole))
            for one in pictures:
                if begin < one.start < end < one.start + one.picture.tokens:
                    end = one.start
            inside = (one for one in pictures if begin <= one.start < end)
            moved = tuple(PlacedPicture(one.start - begin + 1, one.picture) for one in inside)
            yield DocumentPiece(np.concatenate([[self.bos_id], whole[begin:end]]).astype(np.int32), name, moved)
            begin = end
            if begin == len(whole) - 1:  # EOS by itself would be a document without text
                return

    def _flush(self, keep_half: bool) -> list[PackedSequence]:
        sequences = best_fit(self._waiting, self.seq_len)
        sequences.sort(key=lambda sequence: sequence.space)
        done = len(sequences) - (len(sequences) // 2 if keep_half else 0)
        self._waiting = [piece for sequence in sequences[done:] for piece in sequence.pieces]
        self.waiting_tokens = sum(len(piece.ids) for piece in self._waiting)
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


def why_no_pair(pieces: Sequence[str | EncodedPicture]) -> str | None:
    """Return why a document is no image-caption pair, as in counts of dropped documents, or None if it is one."""
    pictures = [piece for piece in pieces if isinstance(piece, EncodedPicture)]
    if not pictures:
        return "without_picture"
    if sum(picture.canvas.tiles for picture in pictures) > 1:
        return "with_several_tiles"
    texts = (piece for piece in pieces if isinstance(piece, str))
    return None if any(_is_visible(text) for text in texts) else "without_caption"


def _is_visible(text: str) -> bool:
    """Return whether a text has more than spaces, control characters and characters of no width."""
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)
