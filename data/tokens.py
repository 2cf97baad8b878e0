"""Token shards: flat files of token ids, memory-mapped, with their sizes and hashes in a manifest.

A document is stored as BOS, its tokens and EOS. Documents follow each other. EOS pads aligned documents and packed
sequences. Sequences are windows of this stream. Ids are uint16 if the vocabulary fits, else uint32.
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
    """One file of a stream, as recorded in the manifest."""

    file: str
    tokens: int
    sha256: str


class TokenWriter:
    """Append documents to shards named `PREFIX-00000.bin` and hash the shards. `close` ends the last shard."""

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
    """Memory-mapped shards as one array of token ids. Opening it checks only the sizes of files. Raises `DataError`."""

    def __init__(self, directory: Path, shards: Sequence[Shard], dtype: np.dtype[Any]) -> None:
        self.directory, self.shards, self.dtype = directory, list(shards), dtype
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._maps: list[NDArray[Any]] = []
        for shard in self.shards:
            if "/" in shard.file or shard.tokens < 0:
                raise _damaged(directory / "manifest.json", f"names {shard.file} with {shard.tokens} tokens")
            path, wanted = directory / shard.file, shard.tokens * dtype.itemsize
            found = path.stat().st_size if path.exists() else None
            if found != wanted:
                raise _damaged(path, "is missing" if found is None else f"has {found} bytes instead of {wanted}")
            # a plain view, because slicing a memmap object takes ten times as long
            self._maps.append(np.memmap(path, dtype=dtype, mode="r").view(np.ndarray) if wanted else np.empty(0, dtype))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def num_sequences(self, seq_len: int) -> int:
        """Count the sequences of `seq_len` tokens, each followed by a token for its last label."""
        return max(0, (len(self) - 1) // seq_len)

    def window(self, start: int, length: int) -> NDArray[np.int64]:
        """Return tokens [start, start + length)."""
        tokens = np.empty(length, np.int64)
        self.read(start, tokens)
        return tokens

    def read(self, start: int, into: NDArray[np.int64]) -> None:
        """Fill `into` with the tokens from `start` on. Raises `IndexError` outside the stream."""
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
    """Raise `DataError` if the content of a shard does not match its hash."""
    path = directory / shard.file
    try:
        if sha256_file(path) != shard.sha256:
            raise _damaged(path, "does not match its SHA-256")
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None


def rebuild(directory: Path) -> str:
    """Return the advice for a damaged directory of tokens."""
    return f"remove {directory} and run again what made it (`leviathan tokenize` or a training run)"


def _damaged(path: Path, state: str) -> DataError:
    return DataError(f"token shard {path} {state}: {rebuild(path.parent)}")
