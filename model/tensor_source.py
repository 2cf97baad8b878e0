"""Sources of a model's weights: any block of any parameter, read on demand.

Leviathan checkpoints, Hugging Face checkpoints and upcycled dense models are read this way, so each rank reads only its
shard and no rank holds a whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.init import reset_buffers
from model.roles import ParameterInfo, registry
from model.transformer import Transformer
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve

Shape = tuple[int, ...]

BLOCK_ELEMENTS = 1 << 24
"""Approximate number of elements per block."""


class TensorSource(Protocol):
    """Parameters of a model, by Leviathan's names."""

    config: ModelConfig
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the block of parameter `name` at `offset`, in the stored dtype, on the CPU."""
        ...


@runtime_checkable
class BiasedSource(TensorSource, Protocol):
    """A source that has the routers' selection biases, which are buffers."""

    def selection_biases(self) -> dict[str, Tensor]:
        """Return the bias on each expert's routing score, [E], by buffer name."""
        ...


def selection_biases(source: TensorSource | None) -> dict[str, Tensor]:
    """Return the biases of a source; empty if it has none."""
    return source.selection_biases() if isinstance(source, BiasedSource) else {}


class PartSources:
    """Parameters of a model that come from several sources. `shapes` has these only: others are not read.

    `sources`: the source of each parameter, by name. Its shape there is that of `config`.
    """

    def __init__(self, config: ModelConfig, sources: Mapping[str, TensorSource]) -> None:
        self.config, self.sources = config, sources
        self.shapes = {name: source.shapes[name] for name, source in sources.items()}
        self.dtypes = {name: source.dtypes[name] for name, source in sources.items()}

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self.sources[name].read(name, offset, shape)


def parameter_infos(config: ModelConfig) -> dict[str, ParameterInfo]:
    """Return every parameter of the model by name, without allocating memory for it."""
    with torch.device("meta"):
        return registry(Transformer(config, resolve(PrecisionConfig(Compute.float32))))


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    return {name: tuple(info.shape) for name, info in parameter_infos(config).items()}


def blocks(shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Yield the offsets and shapes of blocks that cover a tensor. Each block is one expert's, or a range of rows."""
    step = 1 if len(shape) > 2 else max(1, BLOCK_ELEMENTS // (shape[1] if len(shape) > 1 else 1))
    for start in range(0, shape[0], step):
        rest = shape[1:]
        yield (start, *(0 for _ in rest)), (min(step, shape[0] - start), *rest)


def whole(source: TensorSource, name: str) -> Tensor:
    """Read a whole parameter."""
    shape = source.shapes[name]
    return source.read(name, [0] * len(shape), shape)


def materialise(source: TensorSource, dtype: torch.dtype | None = None) -> Transformer:
    """Return the whole model in float32 on the CPU. If `dtype` is given, weights are rounded to it first."""
    with torch.device("meta"):
        model = Transformer(source.config, resolve(PrecisionConfig(Compute.float32)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = whole(source, name)
            parameter.copy_(tensor.to(dtype) if dtype else tensor)
    reset_buffers(model)
    if source.config.router.selection_bias:
        copy_buffers(model, selection_biases(source))
    return model.eval()


@torch.no_grad()
def copy_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the buffers of these names."""
    for name, buffer in model.named_buffers():
        if name in values:
            buffer.copy_(values[name])
