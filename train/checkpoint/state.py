"""What a rank keeps of each stored tensor, and torch.distributed.checkpoint's plans made of it.

Every part is a block of a whole tensor under the tensor's global name, so any layout reads what any other wrote. Of
the ranks that keep the same block one writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from core.errors import CheckpointError
from parallel.sharding import ShardSpec, local


@dataclass(frozen=True)
class TensorShard:
    """This rank's block, beginning at `offset`, of the tensor `name` of `shape`; `writes`: whether it stores it."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    writes: bool = True

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), self.tensor.shape)

    @property
    def key(self) -> str:
        return _key(self.name, self.offset)


def _key(name: str, offset: Sequence[int]) -> str:
    """Of a block among others of the same tensor."""
    return f"{name}@{','.join(map(str, offset))}" if any(offset) else name


def run_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    specs: Mapping[str, ShardSpec] | None = None,
    writes_buffers: bool = True,
) -> list[TensorShard]:
    """Everything a run must keep, sharing storage with the model and the optimizer.

    Without `specs` the model is one process's own. `writes_buffers`: whether this rank stores what is no parameter.
    Names: `model.NAME` and `optimizer.NAME.MOMENT`.
    """
    found = buffers(model, writes_buffers)
    for name, tensor in model.named_parameters():
        found.append(_part(f"model.{name}", tensor, specs[name] if specs else None, writes_buffers))
    if optimizer is not None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            spec = specs[names[parameter]] if specs else None
            for key, value in state.items():
                found.append(_part(f"optimizer.{names[parameter]}.{key}", value, spec, writes_buffers))
    return found


def buffers(model: nn.Module, writes: bool) -> list[TensorShard]:
    """What a model keeps that is no parameter, the same on every rank that has it."""
    trained = {name for name, _ in model.named_parameters()}
    return [
        TensorShard(f"model.{name}", tensor, tuple(tensor.shape), (0,) * tensor.dim(), writes)
        for name, tensor in model.state_dict().items()
        if name not in trained
    ]


def _part(name: str, tensor: Tensor, spec: ShardSpec | None, writes: bool) -> TensorShard:
    part = local(tensor.detach())
    if spec is None:
        return TensorShard(name, part, tuple(part.shape), (0,) * part.dim(), writes)
    if part.dim() == 0:  # a step count: the same for the whole parameter
        return TensorShard(name, part, (), (), spec.is_first)
    return TensorShard(name, part, tuple(spec.info.shape), spec.local_block.offset, spec.is_owner)


class ShardSavePlanner(DefaultSavePlanner):
    """Plans the blocks that this rank writes. The state dict to save is `written(parts)`."""

    def __init__(self, parts: Sequence[TensorShard]) -> None:
        super().__init__(flatten_state_dict=False)
        self.parts = [part for part in parts if _is_written(part)]

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([block_item(p.name, p.chunk, p.shape, p.tensor.dtype) for p in self.parts])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[_key(index.fqn, index.offset or ())]


def written(parts: Sequence[TensorShard]) -> dict[str, Tensor]:
    """The tensors that this rank stores, by `Part.key`."""
    return {part.key: part.tensor for part in parts if _is_written(part)}


def _is_written(part: TensorShard) -> bool:
    return part.writes and part.tensor.numel() > 0


def block_item(name: str, chunk: ChunkStorageMetadata, shape: tuple[int, ...], dtype: torch.dtype) -> WriteItem:
    """A block of a tensor to be stored."""
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class ShardLoadPlanner(DefaultLoadPlanner):
    """Reads this rank's blocks, whoever wrote them. Raises `CheckpointError` where a tensor is not there or has
    another shape.
    """

    def __init__(self, parts: Sequence[TensorShard]) -> None:
        super().__init__(flatten_state_dict=False)
        self.parts = {part.key: part for part in parts}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for part in self.parts.values():
            name, entry = part.name, self.metadata.state_dict_metadata.get(part.name)
            if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != part.shape:
                has = "is missing" if entry is None else f"has shape {list(getattr(entry, 'size', ()))}"
                raise CheckpointError(f"{name} {has} in the checkpoint; this model's has {list(part.shape)}")
            if part.tensor.numel():
                items += create_read_items_for_chunk_list(name, entry, [part.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.parts[_key(index.fqn, index.offset or ())].tensor
