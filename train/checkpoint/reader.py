"""Read a Leviathan checkpoint as a source of tensors, and write a source as a checkpoint, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from core.config import build, plain
from core.errors import CheckpointError, RenamedKeyError, UnreadableFileError
from core.files import write_text
from core.yaml_file import read_yaml
from model.config import ModelConfig
from model.tensor_source import Shape, TensorSource, blocks, parameter_shapes, selection_biases
from train.checkpoint.files import read_bytes, read_shard, write_shards
from train.checkpoint.index import Damaged, IndexedShard, block, commit, problem, read_index
from train.checkpoint.state import TensorShard

IMPORTED = "model.yaml"
TOKENIZER = "tokenizer"
"""Directory of an imported model's tokenizer."""


class CheckpointedModel:
    """Reads the model's tensors from a committed checkpoint. A whole shard is verified before any part of it is used.

    `shapes`: those of its parameters by name; None: a language model's. Raises `CheckpointError` at once if the index
    is damaged, and at the first read of a damaged shard.
    """

    def __init__(self, checkpoint: Path, config: ModelConfig, shapes: dict[str, Shape] | None = None) -> None:
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
        self.shapes = parameter_shapes(config) if shapes is None else shapes
        for name, shape in self.shapes.items():
            tensor = self._tensors.get(name)
            if tensor is None or tensor.shape != tuple(shape):
                has = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                raise CheckpointError(f"{checkpoint}: {name} {has}; the checkpoint does not match its configuration")
        self.dtypes = {name: self._tensors[name].dtype for name in self.shapes}
        self._verified: set[IndexedShard] = set()

    def selection_biases(self) -> dict[str, Tensor]:
        """Return the bias on each expert's routing score, [E], by buffer name."""
        kept = {name: tensor for name, tensor in self._tensors.items() if name.endswith("balance.bias_E")}
        return {name: self.read(name, [0], tensor.shape) for name, tensor in kept.items()}

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        tensor = self._tensors[name]
        result = torch.empty(tuple(shape), dtype=tensor.dtype)
        for shard, low, size in tensor.overlapping(offset, shape):
            rows = torch.empty((size[0], *shard.shape[1:]), dtype=tensor.dtype)  # whole rows are contiguous in the file
            row_bytes = math.prod(shard.shape[1:]) * tensor.dtype.itemsize
            try:
                if shard not in self._verified:
                    read_shard(self.checkpoint, shard)
                    self._verified.add(shard)
                start = shard.start + (low[0] - shard.offset[0]) * row_bytes
                read_bytes(self.checkpoint / shard.file, start, rows)
            except Damaged as error:
                raise CheckpointError(f"{self.checkpoint} is damaged: {error}") from None
            target = block(result, offset, low, size)
            target.copy_(block(rows, (low[0], *shard.offset[1:]), low, size))
        return result


def save_model(source: TensorSource, directory: Path, origin: dict[str, Any], progress: Callable[[int], None]) -> None:
    """Write `source` as a committed checkpoint of step 0, and the model's configuration and origin to `model.yaml`."""
    path = directory / "checkpoints" / "step-00000000"
    path.mkdir(parents=True)
    commit(path, [write_shards(path / "rank_0.bin", _blocks(source, progress))], {"step": 0})
    content = {"model": plain(source.config), "origin": origin}
    write_text(directory / IMPORTED, yaml.safe_dump(content, sort_keys=False))


def _blocks(source: TensorSource, progress: Callable[[int], None]) -> Iterator[TensorShard]:
    """Yield `source` as shards, read a block at a time. Report the bytes of each block to `progress`."""
    for name, whole in source.shapes.items():
        for offset, shape in blocks(whole):
            content = source.read(name, offset, shape)
            progress(content.nbytes)
            yield TensorShard(f"model.{name}", content, whole, offset)
    for name, bias_E in selection_biases(source).items():
        yield TensorShard(f"model.{name}", bias_E, tuple(bias_E.shape), (0,))


def load_imported(directory: Path) -> ModelConfig:
    """Return the configuration of an imported model."""
    try:
        return build(ModelConfig, _section(directory, "model"))
    except RenamedKeyError as error:
        raise CheckpointError(f"{directory / IMPORTED} is of an older format ({error}): import it again") from None


def load_origin(directory: Path) -> tuple[str, dict[str, Any]]:
    """Return the family that an imported model came from, and the keys of its `config.json` that import kept."""
    origin = _section(directory, "origin")
    family, carried = origin.get("family"), origin.get("config")
    if not isinstance(family, str) or not isinstance(carried, dict):
        raise CheckpointError(f"{directory / IMPORTED} is damaged: origin lacks its family or its config")
    return family, carried


def _section(directory: Path, key: str) -> dict[str, Any]:
    path = directory / IMPORTED
    try:
        content = read_yaml(path)
    except UnreadableFileError as error:
        raise CheckpointError(str(error)) from error
    section = content.get(key) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} is damaged: it has no {key}")
    return section
