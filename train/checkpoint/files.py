"""Write and read the shard files of a checkpoint, one file per rank.

A file holds the bytes of its shards one after another, without a container format. They are written from and read into
the tensors' memory directly, at the speed of the disk. Each shard has a digest, which is computed while the shard is
written and checked while it is read. Digests are 128-bit XXH3: they detect damage, not forgery, and computing them is
as fast as the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.autograd.graph import increment_version

from core.errors import CheckpointError
from core.files import is_local, open_raw, write_all
from train.checkpoint.index import Damaged, IndexedShard, IndexedTensor, block, read_index
from train.checkpoint.state import TensorShard

BLOCK_BYTES = 1 << 20
"""A shard is hashed in parts of this size, each while it is in the CPU's cache."""


def write_shards(path: Path, shards: Iterable[TensorShard]) -> dict[str, IndexedTensor]:
    """Write shards one after another into a new file. Return the index entries of their tensors."""
    index: dict[str, IndexedTensor] = {}
    start = 0
    with open_raw(path, "wb") as file:
        for shard in shards:
            tensor = shard.tensor.detach().cpu().contiguous()
            content, digest = _memory(tensor), xxhash.xxh3_128()
            for begin in range(0, len(content), BLOCK_BYTES):
                part = content[begin : begin + BLOCK_BYTES]
                digest.update(part)
                write_all(file, part)
            place = path.name, start, len(content), digest.hexdigest()
            entry = index.setdefault(shard.name, IndexedTensor(tensor.dtype, shard.shape, []))
            entry.shards.append(IndexedShard(shard.offset, tuple(tensor.shape), *place))
            start += len(content)
        if is_local(path):
            os.fsync(file.fileno())
    return index


@torch.no_grad()
def read_state(
    checkpoint: Path, state: Sequence[TensorShard], index: Mapping[str, IndexedTensor] | None = None
) -> None:
    """Read this rank's blocks into `state`. Any ranks may have written them. Every shard that is read is verified.
    `index`: the entries of these blocks, or more; None: read the whole index.

    Raises `CheckpointError` if a tensor is missing or has another shape, and `Damaged` if a shard does not match its
    digest. After an error the content of the tensors is undefined.
    """
    index = read_index(checkpoint) if index is None else index
    reads: list[tuple[IndexedShard, torch.dtype, list[int], Tensor]] = []
    for part in state:
        tensor = index.get(part.name)
        if tensor is None or tensor.shape != part.shape:
            has = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise CheckpointError(f"{checkpoint}: {part.name} {has}; the model expects {list(part.shape)}")
        if part.tensor.numel():
            if not tensor.covers(part.offset, part.tensor.shape):
                raise Damaged(f"the shards of {part.name} do not make up its block at {list(part.offset)}")
            for shard, low, size in tensor.overlapping(part.offset, part.tensor.shape):
                target = block(part.tensor.detach(), part.offset, low, size)
                reads.append((shard, tensor.dtype, low, target))
    last, whole = None, torch.empty(0)
    for shard, dtype, low, target in sorted(reads, key=lambda read: (read[0].file, read[0].start)):
        is_whole = target.shape == shard.shape and target.dtype is dtype
        if is_whole and target.is_contiguous() and target.device.type == "cpu":
            read_shard(checkpoint, shard, target)
            continue
        if shard is not last:
            last, whole = shard, torch.empty(shard.shape, dtype=dtype)
            read_shard(checkpoint, shard, whole)
        target.copy_(block(whole, shard.offset, low, target.shape))


def read_shard(checkpoint: Path, shard: IndexedShard, into: Tensor | None = None) -> None:
    """Read a whole shard into a contiguous CPU tensor. Without a tensor, only verify the shard, in little memory.

    Raises `Damaged` if the shard does not match its digest.
    """
    digest = xxhash.xxh3_128()
    content = memoryview(bytearray(min(BLOCK_BYTES, shard.bytes))) if into is None else _memory(into)
    with open_raw(checkpoint / shard.file, "rb") as file:
        file.seek(shard.start)
        for start in range(0, shard.bytes, BLOCK_BYTES):
            part = content[: shard.bytes - start] if into is None else content[start : start + BLOCK_BYTES]
            _read_all(file, part, shard.file)
            digest.update(part)
    if digest.hexdigest() != shard.digest:
        raise Damaged(f"{shard.file} does not match its digest at byte {shard.start:,}")


def read_bytes(path: Path, start: int, into: Tensor) -> None:
    """Read the bytes from `start` on into a contiguous CPU tensor. Raises `Damaged` if the file ends too early."""
    with open_raw(path, "rb") as file:
        file.seek(start)
        _read_all(file, _memory(into), path.name)


def _memory(tensor: Tensor) -> memoryview:
    """Return a view of a contiguous CPU tensor's memory as bytes, to be written."""
    if not tensor.numel():
        return memoryview(b"")
    increment_version(tensor)  # PyTorch does not see the write, but copies of a weight must be refreshed
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _read_all(file: Any, into: memoryview, name: str) -> None:
    while len(into):
        count = file.readinto(into)
        if not count:
            raise Damaged(f"{name} ends early")
        into = into[count:]
