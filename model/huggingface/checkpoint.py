"""Read a Hugging Face checkpoint as a source of our tensors: check all files on opening, then read block by block."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError, ConfigError, UnreadableFileError
from core.files import read_json
from model.config import ModelConfig
from model.huggingface.block_fp8 import RESULT, STORED, dequantised, names_of_scales, scales_of
from model.huggingface.families import read_config
from model.huggingface.files import TensorEntry, open_directory, read_rows
from model.huggingface.locations import Location, MoENames, bias_locations, locations
from model.huggingface.vision import PROCESSOR_FILES, TENSORS, vision_locations
from model.tensor_source import Shape, blocks, parameter_shapes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    *PROCESSOR_FILES,
)
_BUFFERS = ("rotary_emb.inv_freq",)


class HuggingFaceCheckpoint:
    """A directory with `config.json` and safetensors files.

    Raises `CheckpointError` on opening unless the files are complete and contain exactly the tensors that the
    configuration asks for, in their shapes. `text_only` ignores the tensors of a vision tower.
    """

    def __init__(self, directory: Path, text_only: bool = False) -> None:
        self.directory = directory
        self.raw_config = _parse(directory / "config.json")
        self.family, self.config = read_config(self.raw_config, text_only)
        self.entries: dict[str, TensorEntry] = open_directory(directory)
        self.shapes: dict[str, Shape] = parameter_shapes(self.config)
        self.biases = bias_locations(self.config, self.family.names)
        self.locations = self._locate(text_only)
        self._scales = scales_of(self.entries, directory)
        stored = {name: self.entries[place.tensor()].dtype for name, place in self.locations.items()}
        self.dtypes = {name: RESULT if dtype is STORED else dtype for name, dtype in stored.items()}
        self._last: tuple[tuple[str, int, int, int], Tensor] | None = None

    def selection_biases(self) -> dict[str, Tensor]:
        """Return the bias on each expert's routing score, float32 [E], by buffer name."""
        entries = {name: self.entries[stored] for name, stored in self.biases.items()}
        return {name: read_rows(entry, 0, entry.shape[0])[:, 0].float() for name, entry in entries.items()}

    @property
    def tokenizer_files(self) -> list[Path]:
        return tokenizer_files(self.directory)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        location, whole = self.locations[name], self.shapes[name]
        if len(whole) == 1:
            return read_rows(self.entries[location.name], offset[0], offset[0] + shape[0])[:, 0]
        if len(whole) == 2:
            return self._matrix(location, 0, 0, whole, offset, shape)
        result = torch.empty(tuple(shape), dtype=self.dtypes[name])
        matrices = result if len(whole) == 4 else result[:, None]
        first_half, halves = (offset[1], shape[1]) if len(whole) == 4 else (0, 1)
        for expert in range(shape[0]):
            for half in range(halves):
                place = (offset[0] + expert, first_half + half)
                matrices[expert, half] = self._matrix(location, *place, whole[-2:], offset[-2:], shape[-2:])
        return result

    def _matrix(
        self, location: Location, expert: int, half: int, whole: Shape, offset: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """Read a block of one [out, in] matrix."""
        entry = self.entries[location.tensor(expert, half)]
        if not location.transposed:
            return self._rows(entry, offset[0], offset[0] + shape[0])[:, offset[1] : offset[1] + shape[1]]
        begin, first = expert * whole[1] + offset[1], half * whole[0] + offset[0]
        return self._rows(entry, begin, begin + shape[1])[:, first : first + shape[0]].t()

    def _rows(self, entry: TensorEntry, begin: int, end: int) -> Tensor:
        """Read rows and cache the last result, because gate and up are read in turn and may be in the same rows."""
        key = (str(entry.path), entry.start, begin, end)
        if self._last is None or self._last[0] != key:
            self._last = None  # free the old rows before new ones are read
            rows, scales = read_rows(entry, begin, end), self._scales.get(entry.path, {}).get(entry.start)
            self._last = key, rows if scales is None else dequantised(rows, scales, begin)
        return self._last[1]

    def _locate(self, text_only: bool) -> dict[str, Location]:
        found = parameter_locations(self.config, self.family.names, self.entries.keys())
        extra = {name for name in self.entries if not name.endswith(_BUFFERS)} - names_of_scales(self.entries)
        here = self.directory
        if text_only:
            extra -= {name for name in extra if name.startswith(TENSORS)}
        head, table = found["head.weight"].name, found["embedding.weight"].name
        text = self.raw_config.get("text_config") or {}
        if self.raw_config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)):
            if head in self.entries and table in self.entries:
                self._check_equal(head, table)
            extra.discard(head)
            found["head.weight"] = Location(table)
        for name, location in found.items():
            wanted = location.file_shape(self.shapes[name])
            for stored in location.tensors(self.shapes[name]):
                if stored not in self.entries:
                    raise CheckpointError(f"{here} lacks the tensor {stored}")
                if self.entries[stored].shape != wanted:
                    problem = f"has shape {list(self.entries[stored].shape)}, but config.json asks for {list(wanted)}"
                    raise CheckpointError(f"{here}: {stored} {problem}")
                extra.discard(stored)
        for stored in self.biases.values():
            if stored not in self.entries or self.entries[stored].shape != (self.config.num_experts,):
                raise CheckpointError(f"{here} lacks the tensor {stored} of {self.config.num_experts} elements")
            extra.discard(stored)
        if extra:
            odd = f"{len(extra)} tensors that {self.family.model_type} does not have, such as {min(extra)}"
            raise CheckpointError(f"{here} holds {odd}")
        return found

    def _check_equal(self, first: str, second: str) -> None:
        a, b = self.entries[first], self.entries[second]
        for offset, shape in blocks(a.shape):
            rows = offset[0], offset[0] + shape[0]
            if a.shape != b.shape or not torch.equal(read_rows(a, *rows), read_rows(b, *rows)):
                raise CheckpointError(f"{self.directory}: config.json ties {first} to {second}, but they differ")


def parameter_locations(model: ModelConfig, names: MoENames, available: Collection[str]) -> dict[str, Location]:
    """Return the location of each parameter of the decoder and of the vision encoder, if the model has one."""
    vision = {} if model.vision is None else vision_locations(model.vision)
    return {**locations(model, names, available), **vision}


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the files of the tokenizer in `directory`. Raises `CheckpointError` for a link to a file elsewhere: a copy
    would give away a file of this machine that whoever made the directory only had to name.
    """
    found = [path for name in TOKENIZER_FILES if (path := directory / name).exists()]
    around = _repository(directory.resolve())
    for path in found:
        if not (target := path.resolve()).is_relative_to(around):
            raise CheckpointError(
                f"{path} is a link to {target}, outside of {around}: replace it by a copy of the file"
            )
    return found


def _repository(directory: Path) -> Path:
    """Return the folder that has all files of `directory`. In the cache of the Hugging Face hub this is
    models--OWNER--NAME: files of its snapshots/REVISION are links into its blobs.
    """
    for folder in directory.parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent
    return directory


def _parse(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise ConfigError("source", str(path.parent), "no such directory")
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no config.json")
    try:
        return read_json(path, {})
    except UnreadableFileError as error:
        raise CheckpointError(str(error)) from error
