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
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from core.config import build, plain
from core.errors import CheckpointError
from core.files import write_text
from model.config import ModelConfig
from model.tensor_source import TensorSource, blocks, parameter_shapes
from train.checkpoint.files import CheckpointWriter, read_bytes
from train.checkpoint.index import Damaged, IndexedShard, IndexedTensor, block, problem, read_index
from train.checkpoint.state import write_item

IMPORTED = "model.yaml"
TOKENIZER = "tokenizer"
"""Directory of an imported model's tokenizer."""
_BLOCK_BYTES = 1 << 22


class CheckpointedModel:
    """The model's tensors in a committed checkpoint. A shard is verified whole before any part of it is used.

    Raises `CheckpointError` for damage: at once, or when a damaged shard is first touched.
    """

    def __init__(self, checkpoint: Path, config: ModelConfig) -> None:
        self.checkpoint, self.config = checkpoint, config
        if wrong := problem(checkpoint):
            raise CheckpointError(f"{checkpoint} {wrong}")
        try:
            index = read_index(checkpoint)
        except Damaged as error:
            raise CheckpointError(f"{checkpoint} is damaged: {error}") from None
        self._tensors = {
            name.removeprefix("model."): tensor for name, tensor in index.items() if name.startswith("model.")
        }
        self.shapes = parameter_shapes(config)
        for name, shape in self.shapes.items():
            tensor = self._tensors.get(name)
            if tensor is None or tensor.shape != tuple(shape):
                has = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                raise CheckpointError(f"{checkpoint}: {name} {has}; its model is not what the configuration says")
        self.dtypes = {name: self._tensors[name].dtype for name in self.shapes}
        self._verified: set[IndexedShard] = set()

    def selection_biases(self) -> dict[str, Tensor]:
        """The bias on each expert's routing score, [E], by the buffers' names."""
        kept = {name: tensor for name, tensor in self._tensors.items() if name.endswith("balance.bias_E")}
        return {name: self.read(name, [0], tensor.shape) for name, tensor in kept.items()}

    def selection_bias(self) -> float:
        """The largest absolute selection bias. Other formats cannot hold one."""
        return max((float(bias_E.abs().max()) for bias_E in self.selection_biases().values()), default=0.0)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        tensor = self._tensors[name]
        result = torch.empty(tuple(shape), dtype=tensor.dtype)
        for shard, low, size in tensor.overlapping(offset, shape):
            rows = self._rows(tensor, shard, low[0] - shard.offset[0], size[0])
            target = block(result, offset, low, size)
            target.copy_(block(rows, (low[0], *shard.offset[1:]), low, size))
        return result

    def _rows(self, tensor: IndexedTensor, shard: IndexedShard, start: int, count: int) -> Tensor:
        """Rows of a shard, which lie one after another."""
        rows = torch.empty((count, *shard.shape[1:]), dtype=tensor.dtype)
        width = math.prod(shard.shape[1:]) * tensor.dtype.itemsize
        try:
            self._verify(shard)
            read_bytes(self.checkpoint / shard.file, shard.start + start * width, rows)
        except Damaged as error:
            raise CheckpointError(f"{self.checkpoint} is damaged: {error}") from None
        return rows

    def _verify(self, shard: IndexedShard) -> None:
        if shard in self._verified:
            return
        digest = xxhash.xxh3_128()
        for start in range(0, shard.bytes, _BLOCK_BYTES):
            part = torch.empty(min(_BLOCK_BYTES, shard.bytes - start), dtype=torch.uint8)
            read_bytes(self.checkpoint / shard.file, shard.start + start, part)
            digest.update(memoryview(part.numpy()))  # type: ignore[arg-type]
        if digest.hexdigest() != shard.digest:
            raise Damaged(f"{shard.file} does not match its digest at byte {shard.start:,}")
        self._verified.add(shard)


class _StreamingPlanner(DefaultSavePlanner):
    """Plans blocks of tensors that do not exist yet, and reads each when the writer asks for it."""

    def __init__(self, source: TensorSource, progress: Callable[[int], None]) -> None:
        super().__init__()
        self.source, self.progress = source, progress
        self.blocks: dict[MetadataIndex, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, whole in self.source.shapes.items():
            for offset, shape in blocks(whole):
                item = write_item(f"model.{name}", offset, shape, whole, self.source.dtypes[name])
                self.blocks[item.index] = (name, offset, shape)
                items.append(item)
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        found = self.source.read(*self.blocks[write_item.index]).contiguous()
        self.progress(found.numel() * found.element_size())
        return found


def save_model(source: TensorSource, directory: Path, origin: dict[str, Any], progress: Callable[[int], None]) -> None:
    """Write `source` as a committed checkpoint of step 0, and the model's configuration and origin to `model.yaml`."""
    path = directory / "checkpoints" / "step-00000000"
    path.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one process is a choice, not an accident
        writer = CheckpointWriter(path, {"step": 0})
        dcp.save({}, storage_writer=writer, planner=_StreamingPlanner(source, progress))
    content = {"model": plain(source.config), "origin": origin}
    write_text(directory / IMPORTED, yaml.safe_dump(content, sort_keys=False))


def load_imported(directory: Path) -> ModelConfig:
    """The configuration of an imported model."""
    return build(ModelConfig, _section(directory, "model"))


def load_origin(directory: Path) -> tuple[str, dict[str, Any]]:
    """The family that an imported model came from, and the keys of its `config.json` that import kept."""
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
