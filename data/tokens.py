"""Token shards: flat files of token ids, memory-mapped, with their sizes and hashes in a manifest.

A document is BOS, its tokens, EOS; documents follow each other, and rows are windows of that stream. uint16 where the
vocabulary fits, uint32 otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Appends documents to shards named `PREFIX-00000.bin`, hashing as it goes."""

    def __init__(self, directory: Path, prefix: str, dtype: np.dtype[Any], shard_tokens: int = SHARD_TOKENS) -> None:
        self.directory, self.prefix, self.dtype, self.shard_tokens = directory, prefix, dtype, shard_tokens
        self.shards: list[Shard] = []
        self.tokens = 0
        self._pending: list[NDArray[Any]] = []
        self._pending_tokens = 0

    def add(self, document: Sequence[int] | NDArray[Any]) -> None:
        array = np.asarray(document, dtype=self.dtype)
        self._pending.append(array)
        self._pending_tokens += len(array)
        self.tokens += len(array)
        while self._pending_tokens >= self.shard_tokens:
            self._flush(self.shard_tokens)

    def close(self) -> list[Shard]:
        if self._pending_tokens:
            self._flush(self._pending_tokens)
        return self.shards

    def _flush(self, count: int) -> None:
        joined = np.concatenate(self._pending)
        content, rest = joined[:count].tobytes(), joined[count:]
        name = f"{self.prefix}-{len(self.shards):05d}.bin"
        (self.directory / name).write_bytes(content)
        self.shards.append(Shard(name, count, hashlib.sha256(content).hexdigest()))
        self._pending, self._pending_tokens = [rest], len(rest)


class TokenStream:
    """Shards as one long sequence of token ids. Opening checks sizes; contents are read when asked for."""

    def __init__(self, directory: Path, shards: Sequence[Shard], dtype: np.dtype[Any]) -> None:
        self.directory, self.shards, self.dtype = directory, list(shards), dtype
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._maps: list[NDArray[Any]] = []
        for shard in self.shards:
            path, wanted = directory / shard.file, shard.tokens * dtype.itemsize
            found = path.stat().st_size if path.exists() else None
            if found != wanted:
                state = "is missing" if found is None else f"has {found} bytes instead of {wanted}"
                raise DataError(f"token shard {path} {state}: remove {directory} and run again to make it anew")
            self._maps.append(np.memmap(path, dtype=dtype, mode="r") if wanted else np.empty(0, dtype))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, context: int) -> int:
        """Rows of `context` tokens, each with the one after it as its last label."""
        return max(0, (len(self) - 1) // context)

    def window(self, start: int, length: int) -> NDArray[Any]:
        """Tokens [start, start + length), across shards where need be, in the stored width."""
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"[{start}, {start + length}) lies outside the stream's {len(self)} tokens")
        shard = int(np.searchsorted(self._ends, start, side="right"))
        if length and start + length <= self._ends[shard]:  # the common case, without a copy
            begin = start - (int(self._ends[shard - 1]) if shard else 0)
            return self._maps[shard][begin : begin + length]
        parts = []
        while length > 0:
            begin = start - (int(self._ends[shard - 1]) if shard else 0)
            part = self._maps[shard][begin : begin + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Hash every `parts`-th shard. Raises `DataError` with the file and the fix."""
        for shard in self.shards[part::parts]:
            if sha256_file(self.directory / shard.file) != shard.sha256:
                raise DataError(
                    f"token shard {self.directory / shard.file} does not match its SHA-256: "
                    f"remove {self.directory} and run again to make it anew"
                )
