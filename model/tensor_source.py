"""Tensors of a model that lie somewhere else: any block of any parameter, read when it is asked for.

A checkpoint of our own, one in the Hugging Face format and an upcycled dense model are all read this way, so each rank
takes only its part and no one ever holds a whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.init import reset_buffers
from model.roles import ParameterInfo, registry
from model.transformer import Transformer
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve

Shape = tuple[int, ...]

BLOCK_ELEMENTS = 1 << 24
"""About how many elements of a matrix are handled at a time."""


class TensorSource(Protocol):
    """Parameters by our names."""

    config: ModelConfig
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The block of `name` that begins at `offset` and has `shape`, in the stored format, on the CPU."""
        ...


def parameter_infos(config: ModelConfig) -> dict[str, ParameterInfo]:
    """Every parameter of this model by name; nothing is allocated."""
    with torch.device("meta"):
        return registry(Transformer(config, resolve(PrecisionConfig(Compute.float32))))


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    return {name: tuple(info.shape) for name, info in parameter_infos(config).items()}


def blocks(shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Offsets and shapes that together cover a tensor: an expert at a time, or a number of rows."""
    if len(shape) > 2:
        step = 1
    else:
        step = max(1, BLOCK_ELEMENTS // (shape[1] if len(shape) > 1 else 1))
    for start in range(0, shape[0], step):
        rest = shape[1:]
        yield (start, *(0 for _ in rest)), (min(step, shape[0] - start), *rest)


def whole(source: TensorSource, name: str) -> Tensor:
    """A parameter in one piece."""
    shape = source.shapes[name]
    return source.read(name, [0] * len(shape), shape)


def materialise(source: TensorSource, dtype: torch.dtype | None = None) -> Transformer:
    """The whole model in float32 on the CPU; `dtype` rounds each weight to that format on the way."""
    with torch.device("meta"):
        model = Transformer(source.config, resolve(PrecisionConfig(Compute.float32)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = whole(source, name)
            parameter.copy_(tensor.to(dtype) if dtype else tensor)
    reset_buffers(model)
    return model.eval()
