"""Token shards: flat files of token ids, memory-mapped, with their sizes and hashes in a manifest.

A document is BOS, its tokens, EOS; documents follow each other, with more EOS between them where they are aligned, and
rows are windows of that stream. uint16 where the vocabulary fits, uint32 otherwise.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import DataError
from core.files import sha256_file

SHARD_TOKENS = 1 << 27


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Shard:
    """One file of a stream as the manifest describes it."""

    file: str
    tokens: int
    sha256: str


class TokenWriter:
    """Appends documents to shards named `PREFIX-00000.bin`, hashing as it goes; `close` ends the last one."""

    def __init__(self, directory: Path, prefix: str, dtype: np.dtype[Any], shard_tokens: int = SHARD_TOKENS) -> None:
        self.directory, self.prefix, self.dtype, self.shard_tokens = directory, prefix, dtype, shard_tokens
        self.shards: list[Shard] = []
        self.tokens = 0
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._in_file = 0

    def add(self, document: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        ids = np.asarray(document, dtype=np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() > np.iinfo(self.dtype).max):
            raise OverflowError(f"a token id of {ids.min()} to {ids.max()} does not fit {self.dtype}")
        rest = ids.astype(self.dtype)
        self.tokens += len(rest)
        while len(rest):
            if self._file is None:
                self._file = open(self.directory / self._name(), "wb")  # noqa: SIM115 - outlives this call
                self._hash = hashlib.sha256()
            part, rest = np.split(rest, [self.shard_tokens - self._in_file])
            content = part.tobytes()
            self._file.write(content)
            self._hash.update(content)
            self._in_file += len(part)
            if self._in_file == self.shard_tokens:
                self._end_shard()

    def close(self) -> list[Shard]:
        self._end_shard()
        return self.shards

    def _name(self) -> str:
        return f"{self.prefix}-{len(self.shards):05d}.bin"

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self.shards.append(Shard(self._name(), self._in_file, self._hash.hexdigest()))
            self._file, self._in_file = None, 0


class TokenStream:
    """Shards as one long sequence of token ids. Opening checks sizes; contents are read when asked for."""

    def __init__(self, directory: Path, shards: Sequence[Shard], dtype: np.dtype[Any]) -> None:
        self.directory, self.shards, self.dtype = directory, list(shards), dtype
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._maps: list[NDArray[Any]] = []
        for shard in self.shards:
            path, wanted = directory / shard.file, shard.tokens * dtype.itemsize
            found = path.stat().st_size if path.exists() else None
            if found != wanted:
                state = "is missing" if found is None else f"has {found} bytes instead of {wanted}"
                raise DataError(f"token shard {path} {state}: remove {directory} and run again to make it anew")
            # a plain view: slicing a memmap object costs ten times the slice
            self._maps.append(np.memmap(path, dtype=dtype, mode="r").view(np.ndarray) if wanted else np.empty(0, dtype))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, context: int) -> int:
        """Rows of `context` tokens, each with the one after it as its last label."""
        return max(0, (len(self) - 1) // context)

    def window(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens [start, start + length), across shards where need be."""
        tokens = np.empty(length, np.int64)
        self.read(start, tokens)
        return tokens

    def read(self, start: int, into: NDArray[np.int64]) -> None:
        """Fill `into` with the tokens from `start` on, across shards where need be."""
        length, filled = len(into), 0
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"[{start}, {start + length}) lies outside the stream's {len(self)} tokens")
        shard = bisect_right(self._ends, start)
        while filled < length:
            begin = start + filled - (self._ends[shard - 1] if shard else 0)
            part = self._maps[shard][begin : begin + length - filled]
            into[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1


def verify_shard(directory: Path, shard: Shard) -> None:
    """Raises `DataError` with the file and the fix where its content is not what the manifest says."""
    path = directory / shard.file
    try:
        if sha256_file(path) == shard.sha256:
            return
        state = "does not match its SHA-256"
    except OSError as error:
        state = f"cannot be read ({error.strerror})"
    raise DataError(f"token shard {path} {state}: remove {directory} and run again to make it anew")
