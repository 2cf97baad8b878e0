"""Which part of a parameter this rank stores, for whatever needs the whole tensor's coordinates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model.config import ModelConfig
from model.init import initial_slice, reset_buffers
from model.roles import ParameterInfo
from model.source import TensorSource


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing storage; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_block(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of this rank's part within the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


@torch.no_grad()
def initialise(model: nn.Module, infos: Mapping[str, ParameterInfo], config: ModelConfig, seed: int) -> None:
    """Fill this rank's part of every parameter and reset the buffers; the same model under every layout."""
    for name, parameter in model.named_parameters():
        offset, shape = local_block(parameter)
        part = local(parameter)
        if part.numel():
            part.copy_(initial_slice(infos[name], config, seed, offset, shape, part.device))
    reset_buffers(model)


@torch.no_grad()
def fill(model: nn.Module, source: TensorSource) -> None:
    """Overwrite this rank's part of every parameter by what `source` has there; nothing else is read."""
    for name, parameter in model.named_parameters():
        offset, shape = local_block(parameter)
        part = local(parameter)
        if part.numel():
            part.copy_(source.read(name, offset, shape))
