"""Write a model as a checkpoint in the Hugging Face format, a block at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError, ConfigError
from core.files import new_directory, write_json
from model.huggingface.checkpoint import HuggingFaceCheckpoint, parameter_locations
from model.huggingface.families import write_config
from model.huggingface.files import PlannedTensor, write_directory
from model.huggingface.locations import Location, MoENames, bias_locations
from model.huggingface.vision import processor_files
from model.multipliers import fold_multipliers
from model.tensor_source import TensorSource, blocks, selection_biases


def export(
    source: TensorSource,
    directory: Path,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 << 30,
    extra_config: dict[str, Any] | None = None,
    tokenizer_files: Sequence[Path] = (),
    verify: Callable[[Path], object] = lambda directory: None,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write `source` to `directory`, which appears only once everything is written, reopened and verified by `verify`.

    `dtype`: the dtype of all tensors; None keeps their own. `extra_config` adds keys to `config.json` that do not
    affect the network. Constant multipliers are folded into weights. Raises `ConfigError` if no family expresses
    the model, or if the directory exists.
    """
    if directory.exists():
        raise ConfigError("out", str(directory), "exists already; name a new directory")
    source = fold_multipliers(source)
    chosen, config = write_config(source.config, family)
    places = parameter_locations(source.config, chosen.names, ())
    if set(places) != set(source.shapes):
        odd = sorted(set(places) ^ set(source.shapes))
        raise CheckpointError(f"{odd[0]} has no place in {chosen.model_type} or is missing in the source")
    planned = [tensor for name, place in places.items() for tensor in _plan(source, name, place, dtype)]
    precision = {tensor.dtype for tensor in planned}
    name = str(max(precision, key=lambda kind: kind.itemsize)).removeprefix("torch.")
    planned += _plan_biases(source, chosen.names)
    config |= {"dtype": name, "torch_dtype": name}  # the keys of transformers 5 and 4
    with new_directory(directory, exclusive=True) as scratch:
        write_directory(scratch, planned, shard_bytes, progress)
        extra = extra_config or {}
        if "text_config" in config:
            config["text_config"] = {**extra, **config["text_config"]}
        write_json(scratch / "config.json", {**extra, **config})
        for file, content in processor_files(source.config.vision).items() if source.config.vision else ():
            write_json(scratch / file, content)
        for path in tokenizer_files:
            shutil.copyfile(path, scratch / path.name)
        HuggingFaceCheckpoint(scratch)  # raises unless every tensor is complete and has the right shape
        verify(scratch)


def _plan(source: TensorSource, name: str, location: Location, dtype: torch.dtype | None) -> Iterator[PlannedTensor]:
    """Yield the stored tensors that hold this parameter."""
    shape, kind = source.shapes[name], dtype or source.dtypes[name]
    stored = location.file_shape(shape)
    if len(shape) < 3 or location.transposed:
        yield PlannedTensor(location.name, kind, stored, partial(_whole, source, name, location.transposed))
    else:
        for number, tensor in enumerate(location.tensors(shape)):
            yield PlannedTensor(tensor, kind, stored, partial(_one, source, name, number))


def _plan_biases(source: TensorSource, names: MoENames) -> Iterator[PlannedTensor]:
    """Yield the routers' selection biases, in float32. A source without them has zeros."""
    values = selection_biases(source)
    for name, stored in bias_locations(source.config, names).items():
        bias_E = values.get(name, torch.zeros(source.config.num_experts)).float()
        yield PlannedTensor(stored, torch.float32, tuple(bias_E.shape), partial(_one_block, bias_E))


def _one_block(block: Tensor) -> Iterator[Tensor]:
    yield block


def _whole(source: TensorSource, name: str, transposed: bool) -> Iterator[Tensor]:
    """Yield the parameter in blocks. If `transposed`, each block is an expert's [in, out], gate and up joined."""
    for offset, shape in blocks(source.shapes[name]):
        block = source.read(name, offset, shape)
        yield block.flatten(0, -2).t() if transposed else block


def _one(source: TensorSource, name: str, number: int) -> Iterator[Tensor]:
    """Yield the `number`-th matrix of a parameter, counted over experts and their halves."""
    *outer, rows, columns = source.shapes[name]
    place = divmod(number, outer[1]) if len(outer) == 2 else (number,)
    yield source.read(name, (*place, 0, 0), (*(1 for _ in outer), rows, columns)).flatten(0, -2)
