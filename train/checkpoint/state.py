"""List the shards of tensors that a rank holds, for a checkpoint.

Each shard is a block of a whole tensor and has the tensor's global name, so any layout can read what any other wrote.
If several ranks hold the same block, one of them writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.sharding import ShardSpec, local


@dataclass(frozen=True)
class TensorShard:
    """This rank's block at `offset` of the tensor `name`, whose whole shape is `shape`. `writes`: whether this rank
    saves it.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    writes: bool = True


def run_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    specs: Mapping[str, ShardSpec] | None = None,
    writes_buffers: bool = True,
) -> list[TensorShard]:
    """Return the shards that a resumed run needs. They share memory with the model and the optimizer.

    Without `specs` the model is unsharded. `writes_buffers`: whether this rank saves the buffers. Names: `model.NAME`
    and `optimizer.NAME.MOMENT`.
    """
    found = buffers(model, writes_buffers)
    for name, tensor in model.named_parameters():
        found.append(_shard(f"model.{name}", tensor, specs[name] if specs else None, writes_buffers))
    if optimizer is not None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            spec = specs[names[parameter]] if specs else None
            for key, value in state.items():
                found.append(_shard(f"optimizer.{names[parameter]}.{key}", value, spec, writes_buffers))
    return found


def buffers(model: nn.Module, writes: bool) -> list[TensorShard]:
    """Return the model's buffers, which are the same on every rank that has them."""
    trained = {name for name, _ in model.named_parameters()}
    return [
        TensorShard(f"model.{name}", tensor, tuple(tensor.shape), (0,) * tensor.dim(), writes)
        for name, tensor in model.state_dict().items()
        if name not in trained
    ]


def _shard(name: str, tensor: Tensor, spec: ShardSpec | None, writes: bool) -> TensorShard:
    part = local(tensor.detach())
    if spec is None:
        return TensorShard(name, part, tuple(part.shape), (0,) * part.dim(), writes)
    if part.dim() == 0:  # a step count, which is the same for the whole parameter
        return TensorShard(name, part, (), (), spec.is_first)
    return TensorShard(name, part, tuple(spec.info.shape), spec.local_block.offset, spec.is_owner)
