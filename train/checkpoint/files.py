"""The files of a checkpoint: plain bytes of tensors, one file per rank, under torch.distributed.checkpoint's plans.

DCP decides who writes and reads what, so that any layout loads any other's; what lies in the files is ours: tensors'
own bytes one after the other, without a container around each. They are written and read at the speed of the disk,
straight from and into the tensors' memory. Every piece has a digest, made on its way out and held against what is read
on its way in: each rank verifies what it reads, in one pass. Digests are XXH3 of 128 bits: they are there to find
damage, not forgery, and must keep up with the disk.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from core.files import is_local, open_raw, write_bytes

BLOCK_BYTES = 1 << 20
METADATA = ".metadata"
T = TypeVar("T")


class Damaged(Exception):
    """What is on the disk is not what was written."""


@dataclass(frozen=True)
class ShardLocation:
    """Where a piece lies and what it must hash to. DCP keeps it in `.metadata` under the piece's index."""

    file: str
    offset: int
    size: int
    digest: str


class PlainWriter(BlockingAsyncStager, dcp.StorageWriter):
    """Writes this rank's pieces into one file. Beside the files lies `.metadata`, which says what is where."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.directory = path

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank_{rank}.bin") for rank, plan in enumerate(plans)]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for rank in results for result in rank}
        write_bytes(self.directory / METADATA, pickle.dumps(metadata))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name, offset = plan.storage_data, 0
        results: list[WriteResult] = []
        if not plan.items:  # a copy of what others keep
            return _done(results)
        self.directory.mkdir(parents=True, exist_ok=True)  # rank 0 has made it, where all see the same disk
        with open_raw(self.directory / name, "wb") as file:
            for item in plan.items:
                content, digest = _bytes_of(planner.resolve_data(item)), xxhash.xxh3_128()
                for block in _blocks(content):
                    digest.update(block)
                    _write_all(file, block)
                place = ShardLocation(name, offset, len(content), digest.hexdigest())
                results.append(WriteResult(index=item.index, size_in_bytes=len(content), storage_data=place))
                offset += len(content)
            if is_local(self.directory):
                os.fsync(file.fileno())
        return _done(results)


class PlainReader(dcp.StorageReader):
    """Reads what `PlainWriter` wrote: whole pieces straight into their tensors, parts of pieces by way of the piece.

    Raises `Damaged` for a piece that does not match its digest; its tensor is then undefined.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path
        self.storage_data: dict[MetadataIndex, ShardLocation] = {}
        self.pieces: dict[MetadataIndex, tuple[torch.dtype, torch.Size]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return pickle.loads((self.directory / METADATA).read_bytes())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.storage_data = metadata.storage_data
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                for chunk in entry.chunks:
                    self.pieces[MetadataIndex(name, chunk.offsets)] = (entry.properties.dtype, chunk.sizes)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        read: tuple[ShardLocation, Tensor] | None = None  # the last piece that was wanted in parts
        for place, item in sorted(
            ((self.storage_data[item.storage_index], item) for item in plan.items),
            key=lambda pair: (pair[0].file, pair[0].offset),
        ):
            if item.type is LoadItemType.BYTE_IO:
                content = bytearray(place.size)
                self._read(place, memoryview(content))
                planner.load_bytes(item, io.BytesIO(content))
                continue
            target = planner.resolve_tensor(item).detach()
            dtype, shape = self.pieces[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
            whole = tuple(item.lengths) == tuple(shape) and target.dtype is dtype
            if whole and target.is_contiguous() and target.device.type == "cpu":
                self._read(place, _memory(target))
            else:
                if read is None or read[0] != place:
                    read = place, torch.empty(shape, dtype=dtype)
                    self._read(place, _memory(read[1]))
                part = read[1]
                for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dimension, start, length)
                target.copy_(part)
            planner.commit_tensor(item, target)
        return _done(None)

    def _read(self, place: ShardLocation, into: memoryview) -> None:
        digest = xxhash.xxh3_128()
        with open_raw(self.directory / place.file, "rb") as file:
            file.seek(place.offset)
            for block in _blocks(into):
                _read_all(file, block, place.file)
                digest.update(block)
        if len(into) != place.size or digest.hexdigest() != place.digest:
            raise Damaged(f"{place.file} does not match its digest at byte {place.offset:,}")


def read_exactly(path: Path, offset: int, into: Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes at `offset`; raises `Damaged` where the file ends before."""
    with open_raw(path, "rb") as file:
        file.seek(offset)
        _read_all(file, _memory(into), path.name)


def _done(value: T) -> Future[T]:
    done: Future[T] = Future()
    done.set_result(value)
    return done


def _blocks(content: memoryview) -> Iterator[memoryview]:
    """Parts small enough to be hashed while they are still in the processor's cache."""
    for start in range(0, len(content), BLOCK_BYTES):
        yield content[start : start + BLOCK_BYTES]


def _bytes_of(data: Tensor | io.BytesIO) -> memoryview:
    return data.getbuffer() if isinstance(data, io.BytesIO) else _memory(data.detach().cpu().contiguous())


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write_all(file: Any, content: memoryview) -> None:
    while len(content):
        content = content[file.write(content) :]


def _read_all(file: Any, into: memoryview, name: str) -> None:
    while len(into):
        count = file.readinto(into)
        if not count:
            raise Damaged(f"{name} ends early")
        into = into[count:]
