"""Read and write the safetensors format: read rows of a tensor, and write tensors in blocks.

A file consists of the length of its header (8 bytes, little-endian), the header as JSON (name -> dtype, shape, offsets)
and the bytes of the tensors. The `safetensors` package maps whole files and writes whole tensors, so its memory grows
with the largest tensor (21 GB in Llama 4 Maverick). Here memory is bounded by the size of a block. The package can
read the files that are written here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError, UnreadableFileError
from core.files import check_regular, misfit, parse_json, read_json, write_all, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where the bytes of one tensor are stored: in `path`, from byte `start`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def open_directory(directory: Path) -> dict[str, TensorEntry]:
    """Return every tensor of a checkpoint directory. Raises `CheckpointError` unless index and files agree."""
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if not (directory / INDEX).exists():
        if pickles := [path.name for ending in ("bin", "pt", "pth") for path in sorted(directory.glob(f"*.{ending}"))]:
            danger = "which can run code when they are loaded; convert them to safetensors first"
            raise CheckpointError(f"{directory} holds pickle files ({pickles[0]}), {danger}")
        raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}")
    try:
        weight_map: dict[str, str] = read_json(directory / INDEX, {"weight_map": {str: str}})["weight_map"]
    except UnreadableFileError as error:
        raise CheckpointError(f"{error}, so it is not an index of shards") from error
    files = {path.name for path in directory.iterdir() if path.is_file()}
    found: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if shard not in files:
            raise CheckpointError(f"{directory / INDEX} names {shard}, which is not there")
        for name, entry in read_header(directory / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{directory / shard} holds {name}, which {INDEX} does not place there")
            found[name] = entry
    if missing := sorted(set(weight_map) - set(found)):
        raise CheckpointError(f"{directory / weight_map[missing[0]]} lacks {missing[0]}, which {INDEX} places there")
    return found


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one file. Raises `CheckpointError` if its header is invalid or does not match its size."""
    check_regular(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{path} is truncated or not a safetensors file")
        try:
            header: dict[str, Any] = parse_json(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has an unreadable header, which {error}") from error
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    if problem := misfit(header, {str: {"dtype": str, "shape": [int], "data_offsets": [int]}}, "the header"):
        raise CheckpointError(f"{path} has a malformed header: {problem}")
    found, reached = {}, 0
    for name, entry in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name} is stored as {entry['dtype']}; readable are {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        end = reached + math.prod(shape) * dtype.itemsize
        if entry["data_offsets"] != [reached, end] or any(size < 0 for size in shape):
            raise CheckpointError(f"{path}: the bytes of {name} do not fit its shape {list(shape)}")
        found[name], reached = TensorEntry(path, dtype, shape, 8 + length + reached), end
    if 8 + length + reached != size:
        raise CheckpointError(f"{path} is truncated: {size:,} bytes instead of {8 + length + reached:,}")
    return found


def read_rows(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Read rows [start, stop) of a tensor, viewed as a matrix [rows, last dimension], or as a column if a vector."""
    width = entry.shape[-1] if len(entry.shape) > 1 else 1
    rows = math.prod(entry.shape) // width if width else 0
    if not 0 <= start <= stop <= rows:  # bytes outside belong to another tensor
        raise CheckpointError(f"{entry.path}: cannot read rows {start} to {stop} of a tensor that has {rows}")
    result = torch.empty(stop - start, width, dtype=entry.dtype)
    memory = bytes_of(result)
    with open(entry.path, "rb", buffering=0) as file:
        file.seek(entry.start + start * width * entry.dtype.itemsize)
        while len(memory):
            count = file.readinto(memory)
            if not count:
                raise CheckpointError(f"{entry.path} ends early")
            memory = memory[count:]
    return result


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a view of the bytes of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")  # type: ignore[arg-type]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: `blocks` yields its elements in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_directory(
    directory: Path,
    tensors: Sequence[PlannedTensor],
    shard_bytes: int,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the shards and their index. `progress` is called after each block with its number of bytes."""
    shards: list[list[PlannedTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_file(directory / name, shard, progress)
        weight_map |= {tensor.name: name for tensor in shard}
    if count > 1:
        elements = sum(math.prod(t.shape) for t in tensors)
        metadata = {"total_size": sum(t.size for t in tensors), "total_parameters": elements}
        write_json(directory / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _write_file(path: Path, tensors: Sequence[PlannedTensor], progress: Callable[[int], None]) -> None:
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        place = {"data_offsets": [offset, offset + tensor.size]}
        header[tensor.name] = {"dtype": spelled[tensor.dtype], "shape": list(tensor.shape), **place}
        offset += tensor.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors:
            written = 0
            for block in tensor.blocks():
                content = bytes_of(block.to(tensor.dtype).contiguous())
                write_all(file, content)
                written += len(content)
                progress(len(content))
            if written != tensor.size:
                raise CheckpointError(f"{tensor.name}: {written:,} bytes instead of {tensor.size:,}")
        os.fsync(file.fileno())
