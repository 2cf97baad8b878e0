"""The files of a checkpoint: the bytes of shards, one file per rank.

torch.distributed.checkpoint plans which rank writes which shard, and runs a save in the background. A file holds the
bytes of its shards one after another, without a container around each, so that they are written and read at the speed
of the disk, straight from and into the tensors' memory. Each shard has a digest, made while it is written and checked
while it is read. Digests are XXH3 of 128 bits: they find damage, not forgery, and keep up with the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from core.errors import CheckpointError
from core.files import is_local, open_raw, write_all
from train.checkpoint.index import Damaged, IndexedShard, IndexedTensor, block, commit, read_index
from train.checkpoint.state import TensorShard

BLOCK_BYTES = 1 << 20


class CheckpointWriter(BlockingAsyncStager, dcp.StorageWriter):
    """Writes this rank's shards into one file. Once all ranks are done, the coordinator writes index and marker."""

    def __init__(self, checkpoint: Path, progress: dict[str, Any]) -> None:
        super().__init__()
        self.directory, self.progress = checkpoint, progress

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank_{rank}.bin") for rank, plan in enumerate(plans)]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        done: Future[list[WriteResult]] = Future()
        if plan.items:  # a rank may hold nothing but copies that others write
            self.directory.mkdir(parents=True, exist_ok=True)  # rank 0 made it, perhaps on a disk of its own
            start = 0
            with open_raw(self.directory / plan.storage_data, "wb") as file:
                for item in plan.items:
                    tensor: Any = planner.resolve_data(item)
                    content, digest = _memory(tensor.detach().cpu().contiguous()), xxhash.xxh3_128()
                    for part in _blocks(content):
                        digest.update(part)
                        write_all(file, part)
                    written = (plan.storage_data, start, len(content), digest.hexdigest())
                    results.append(WriteResult(item.index, len(content), written))
                    start += len(content)
                if is_local(self.directory):
                    os.fsync(file.fileno())
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {result.index: result.storage_data for rank in results for result in rank}
        index = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            shards = [
                IndexedShard(tuple(one.offsets), tuple(one.sizes), *written[MetadataIndex(name, one.offsets)])
                for one in entry.chunks
            ]
            index[name] = IndexedTensor(entry.properties.dtype, tuple(entry.size), shards)
        commit(self.directory, index, self.progress)


@torch.no_grad()
def read_state(checkpoint: Path, state: Sequence[TensorShard]) -> None:
    """Read this rank's blocks, in place, whoever wrote them. Every shard that is touched is verified.

    Raises `CheckpointError` where a tensor is missing or has another shape, `Damaged` for a shard that does not match
    its digest; tensors are then undefined.
    """
    index = read_index(checkpoint)
    reads: list[tuple[IndexedShard, torch.dtype, list[int], Tensor]] = []
    for part in state:
        tensor = index.get(part.name)
        if tensor is None or tensor.shape != part.shape:
            has = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise CheckpointError(f"{checkpoint}: {part.name} {has}; this model's has {list(part.shape)}")
        if part.tensor.numel():
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


def read_shard(checkpoint: Path, shard: IndexedShard, into: Tensor) -> None:
    """Fill a contiguous CPU tensor with a whole shard. Raises `Damaged` where it does not match its digest."""
    digest = xxhash.xxh3_128()
    with open_raw(checkpoint / shard.file, "rb") as file:
        file.seek(shard.start)
        for part in _blocks(_memory(into)):
            _read_all(file, part, shard.file)
            digest.update(part)
    if digest.hexdigest() != shard.digest:
        raise Damaged(f"{shard.file} does not match its digest at byte {shard.start:,}")


def read_bytes(path: Path, start: int, into: Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes at `start`. Raises `Damaged` where the file ends before."""
    with open_raw(path, "rb") as file:
        file.seek(start)
        _read_all(file, _memory(into), path.name)


def _blocks(content: memoryview) -> Iterator[memoryview]:
    """Parts that are hashed while they are still in the processor's cache."""
    for start in range(0, len(content), BLOCK_BYTES):
        yield content[start : start + BLOCK_BYTES]


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _read_all(file: Any, into: memoryview, name: str) -> None:
    while len(into):
        count = file.readinto(into)
        if not count:
            raise Damaged(f"{name} ends early")
        into = into[count:]
