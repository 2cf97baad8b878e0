"""The files of a checkpoint: plain bytes of tensors, one file per rank, under torch.distributed.checkpoint's plans.

DCP decides who writes and reads what, so that any layout loads any other's; what lies in the files is ours: tensors'
own bytes one after the other, without a container around each. They are written and read at the speed of the disk,
straight from and into the tensors' memory, and hashed on the way out.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

BLOCK_BYTES = 1 << 20


class PlainWriter(dcp.FileSystemWriter):
    """Writes this rank's tensors into one file and remembers its size and digest in `digests`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, single_file_per_rank=True, overwrite=True)
        self.directory = Path(path)
        self.digests: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name, digest, offset = f"{plan.storage_data.prefix}0.distcp", xxhash.xxh3_128(), 0
        results = []
        with open(self.directory / name, "wb", buffering=0) as file:
            for item in plan.items:
                content = _bytes_of(planner.resolve_data(item))
                digest.update(content)
                _write_all(file, content)
                place = _StorageInfo(name, offset, len(content))
                results.append(WriteResult(index=item.index, size_in_bytes=len(content), storage_data=place))
                offset += len(content)
            os.fsync(file.fileno())
        self.digests[name] = {"bytes": offset, "xxh3_128": digest.hexdigest()}
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class PlainReader(dcp.FileSystemReader):
    """Reads what `PlainWriter` wrote: whole pieces straight into their tensors, parts of pieces by way of the piece."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.directory = Path(path)
        self.pieces: dict[MetadataIndex, tuple[torch.dtype, torch.Size]] = {}

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                for chunk in entry.chunks:
                    self.pieces[MetadataIndex(name, chunk.offsets)] = (entry.properties.dtype, chunk.sizes)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in sorted(plan.items, key=lambda item: self._place(item.storage_index)):
            place: _StorageInfo = self.storage_data[item.storage_index]
            with open(self.directory / place.relative_path, "rb", buffering=0) as file:
                file.seek(place.offset)
                if item.type is LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(file.read(place.length)))
                    continue
                target = planner.resolve_tensor(item).detach()
                dtype, shape = self.pieces[MetadataIndex(item.storage_index.fqn, item.storage_index.offset)]
                whole = tuple(item.lengths) == tuple(shape) and target.dtype is dtype
                if whole and target.is_contiguous() and target.device.type == "cpu":
                    _read_all(file, _memory(target))
                else:
                    piece = torch.empty(shape, dtype=dtype)
                    _read_all(file, _memory(piece))
                    for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        piece = piece.narrow(dimension, start, length)
                    target.copy_(piece)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, index: MetadataIndex) -> tuple[str, int]:
        place = self.storage_data[index]
        return place.relative_path, place.offset


def hash_file(path: Path) -> dict[str, Any]:
    """Size and digest of a file as `PlainWriter` notes them."""
    digest, block, size = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES)), 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _bytes_of(data: Tensor | io.BytesIO) -> memoryview:
    return data.getbuffer() if isinstance(data, io.BytesIO) else _memory(data.detach().cpu().contiguous())


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write_all(file: io.FileIO, content: memoryview) -> None:
    while len(content):
        content = content[file.write(content) :]


def _read_all(file: io.FileIO, into: memoryview) -> None:
    while len(into):
        count = file.readinto(into)
        if not count:
            raise OSError(f"{file.name} ends early")
        into = into[count:]
