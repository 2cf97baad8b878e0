"""A checkpoint of ours as a source of tensors, and a source of tensors as a checkpoint of ours, a block at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
import yaml
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from core.config import build, plain
from core.errors import CheckpointError
from core.files import write_text
from model.config import ModelConfig
from model.tensor_source import TensorSource, blocks, parameter_shapes
from train.checkpoint.files import Damaged, PlainReader, ShardLocation, read_exactly
from train.checkpoint.manager import CommittedWriter, problems
from train.checkpoint.state import block_item

IMPORTED = "model.yaml"
TOKENIZER = "tokenizer"
"""Directory of an imported model's tokenizer."""
_BLOCK_BYTES = 1 << 22


class StoredModel:
    """The model's tensors in a committed checkpoint. A piece is verified whole before any part of it is used.

    Raises `CheckpointError` for damage, at once or when the damaged piece is first touched.
    """

    def __init__(self, checkpoint: Path, config: ModelConfig) -> None:
        wrong = problems(checkpoint)
        if wrong:
            raise CheckpointError(f"{checkpoint} is damaged: {wrong[0]}")
        self.checkpoint, self.config = checkpoint, config
        metadata = PlainReader(checkpoint).read_metadata()
        self._places: dict[MetadataIndex, ShardLocation] = metadata.storage_data
        self._entries: dict[str, TensorStorageMetadata] = {
            name.removeprefix("model."): entry
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = parameter_shapes(config)
        self.dtypes = {name: self._entry(name).properties.dtype for name in self.shapes}
        self._verified: set[ShardLocation] = set()

    def selection_biases(self) -> dict[str, Tensor]:
        """The biases by which each router's choice is moved, [E], by their buffers' names."""
        kept = {name: entry for name, entry in self._entries.items() if name.endswith("balance.bias_E")}
        return {name: self._read(name, entry, [0], entry.size) for name, entry in kept.items()}

    def selection_bias(self) -> float:
        """The largest absolute bias by which a router's choice is moved; it has no place in other formats."""
        return max((float(bias_E.abs().max()) for bias_E in self.selection_biases().values()), default=0.0)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self._read(name, self._entry(name), offset, shape)

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._entries.get(name)
        if entry is None or tuple(entry.size) != self.shapes.get(name, ()):
            has = "is missing" if entry is None else f"has shape {list(entry.size)}"
            raise CheckpointError(f"{self.checkpoint}: {name} {has}; its model is not what the configuration says")
        return entry

    def _read(self, name: str, entry: TensorStorageMetadata, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        result, filled = torch.empty(tuple(shape), dtype=entry.properties.dtype), 0
        for chunk in entry.chunks:
            low = [max(o, c) for o, c in zip(offset, chunk.offsets, strict=True)]
            high = [min(o + s, c + d) for o, s, c, d in zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            rows = self._rows(name, chunk, result.dtype, low[0] - chunk.offsets[0], high[0] - chunk.offsets[0])
            target = result
            for dimension, (a, b) in enumerate(zip(low, high, strict=True)):
                target = target.narrow(dimension, a - offset[dimension], b - a)
                if dimension:
                    rows = rows.narrow(dimension, a - chunk.offsets[dimension], b - a)
            target.copy_(rows)
            filled += target.numel()
        if filled != result.numel():
            raise CheckpointError(f"{self.checkpoint}: parts of {name} are missing")
        return result

    def _rows(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a stored piece: they lie one after the other."""
        place = self._places[MetadataIndex(f"model.{name}", chunk.offsets)]
        try:
            self._verify(place)
            rows = torch.empty((stop - start, *chunk.sizes[1:]), dtype=dtype)
            width = math.prod(chunk.sizes[1:]) * dtype.itemsize
            read_exactly(self.checkpoint / place.file, place.offset + start * width, rows)
        except Damaged as error:
            raise CheckpointError(f"{self.checkpoint} is damaged: {error}") from None
        return rows

    def _verify(self, place: ShardLocation) -> None:
        if place in self._verified:
            return
        digest = xxhash.xxh3_128()
        for start in range(0, place.size, _BLOCK_BYTES):
            block = torch.empty(min(_BLOCK_BYTES, place.size - start), dtype=torch.uint8)
            read_exactly(self.checkpoint / place.file, place.offset + start, block)
            digest.update(memoryview(block.numpy()))  # type: ignore[arg-type]
        if digest.hexdigest() != place.digest:
            raise Damaged(f"{place.file} does not match its digest at byte {place.offset:,}")
        self._verified.add(place)


class _StreamingPlanner(DefaultSavePlanner):
    """Plans blocks of tensors that do not exist yet and reads each when the writer gets to it."""

    def __init__(self, source: TensorSource, progress: Callable[[int], None]) -> None:
        super().__init__()
        self.source, self.progress = source, progress
        self.blocks: dict[MetadataIndex, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for name in self.source.shapes:
            whole = self.source.shapes[name]
            for offset, shape in blocks(whole):
                chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
                item = block_item(f"model.{name}", chunk, whole, self.source.dtypes[name])
                self.blocks[item.index] = (name, offset, shape)
                items.append(item)
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name, offset, shape = self.blocks[write_item.index]
        block = self.source.read(name, offset, shape).contiguous()
        self.progress(block.numel() * block.element_size())
        return block


def save_model(source: TensorSource, directory: Path, origin: dict[str, Any], progress: Callable[[int], None]) -> None:
    """Write `source` as a committed checkpoint of step 0 beside `model.yaml`, which says what the model is."""
    path = directory / "checkpoints" / "step-00000000"
    path.mkdir(parents=True)
    writer = CommittedWriter(path, {"step": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one process is a choice, not an accident
        dcp.save({}, storage_writer=writer, planner=_StreamingPlanner(source, progress))
    content = {"model": plain(source.config), "origin": origin}
    write_text(directory / IMPORTED, yaml.safe_dump(content, sort_keys=False))


def load_imported(directory: Path) -> ModelConfig:
    """The model that an imported directory says it is."""
    return build(ModelConfig, _section(directory, "model"))


def load_origin(directory: Path) -> tuple[str, dict[str, Any]]:
    """The family that an imported model came from, and the keys of its `config.json` that were carried along."""
    origin = _section(directory, "origin")
    family, carried = origin.get("family"), origin.get("config")
    if not isinstance(family, str) or not isinstance(carried, dict):
        raise CheckpointError(f"{directory / IMPORTED} is damaged: origin lacks its family or its config")
    return family, carried


def _section(directory: Path, key: str) -> dict[str, Any]:
    path = directory / IMPORTED
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"{path} is unreadable ({' '.join(str(error).split())})") from error
    section = content.get(key) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} is damaged: it has no {key}")
    return section
