"""Writes a model as a checkpoint in the Hugging Face format, a block at a time."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError, ConfigError
from core.files import new_directory, write_json
from model.huggingface.checkpoint import HuggingFaceCheckpoint
from model.huggingface.families import write_config
from model.huggingface.files import Planned, write_directory
from model.huggingface.locations import Location, locations
from model.source import TensorSource, blocks


def export(
    source: TensorSource,
    directory: Path,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 << 30,
    extra_config: dict[str, Any] | None = None,
    tokenizer_files: Sequence[Path] = (),
    verify: Callable[[Path], None] = lambda directory: None,
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write `source` to `directory`, which appears only once everything is written, reopened and `verify`-ed.

    `dtype` None keeps each tensor's own; `extra_config` adds keys to `config.json` that do not change the network.
    Raises `ConfigError` where no family expresses the model or the directory exists.
    """
    if directory.exists():
        raise ConfigError("out", str(directory), "exists already; name a new directory")
    chosen, config = write_config(source.config, family)
    places = locations(source.config, chosen.names, ())
    by_name: dict[str, list[str]] = defaultdict(list)
    for ours, location in places.items():
        by_name[location.name].append(ours)
    if set(places) != set(source.shapes):
        odd = sorted(set(places) ^ set(source.shapes))
        raise CheckpointError(f"{odd[0]} has no place in {chosen.model_type} or is missing in the source")
    planned = [tensor for names in by_name.values() for tensor in _plan(source, places, names, dtype)]
    precision = {tensor.dtype for tensor in planned}
    config["dtype"] = str(max(precision, key=lambda kind: kind.itemsize)).removeprefix("torch.")
    with new_directory(directory) as scratch:
        write_directory(scratch, planned, shard_bytes, progress)
        write_json(scratch / "config.json", {**(extra_config or {}), **config})
        for path in tokenizer_files:
            shutil.copyfile(path, scratch / path.name)
        HuggingFaceCheckpoint(scratch)  # every tensor written once, whole and in shape, or this raises
        verify(scratch)


def _plan(
    source: TensorSource, places: dict[str, Location], names: list[str], dtype: torch.dtype | None
) -> Iterator[Planned]:
    """The stored tensor, or one per expert, that holds these parameters (several lie side by side)."""
    location, shape = places[names[0]], source.shapes[names[0]]
    ordered = sorted(names, key=lambda name: places[name].part)
    kind = dtype or source.dtypes[names[0]]
    stored = location.file_shape(shape)
    if "{expert}" in location.name:
        for expert in range(shape[0]):
            read = partial(_expert, source, ordered[0], expert)
            yield Planned(location.name.format(expert=expert), kind, stored, read)
    elif location.transposed:
        yield Planned(location.name, kind, stored, partial(_side_by_side, source, ordered))
    else:
        yield Planned(location.name, kind, stored, partial(_in_order, source, ordered[0]))


def _in_order(source: TensorSource, name: str) -> Iterator[Tensor]:
    for offset, shape in blocks(source.shapes[name]):
        yield source.read(name, offset, shape)


def _expert(source: TensorSource, name: str, expert: int) -> Iterator[Tensor]:
    yield source.read(name, (expert, 0, 0), (1, *source.shapes[name][1:]))


def _side_by_side(source: TensorSource, names: list[str]) -> Iterator[Tensor]:
    experts, rows, columns = source.shapes[names[0]]
    for expert in range(experts):
        parts = [source.read(name, (expert, 0, 0), (1, rows, columns))[0].t() for name in names]
        yield torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
