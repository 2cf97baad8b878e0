"""Read matrices that are stored in FP8 with a scale for each block of 128 x 128 elements, as DeepSeek-V3's.

A matrix `NAME` of float8 values has the scales `NAME_scale_inv`, float32. Its values are their products, rounded to
bfloat16, as by the script that DeepSeek publishes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError, ConfigError
from model.huggingface.files import TensorEntry, read_rows

BLOCK = 128
STORED, RESULT = torch.float8_e4m3fn, torch.bfloat16
_SCALES = "_scale_inv"
_FORMAT = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def check_quantization(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless a `config.json` asks for no quantization, or for this one."""
    given = config.get("quantization_config")
    if not given:
        return
    for key, value in _FORMAT.items():
        found = given.get(key) if isinstance(given, Mapping) else None
        if found != value and not (key == "fmt" and found is None):
            raise ConfigError(f"config.json quantization_config.{key}", found, "is not supported", [value])


def scales_of(entries: Mapping[str, TensorEntry], directory: Path) -> dict[Path, dict[int, TensorEntry]]:
    """Return the scales of each float8 matrix, by its file and first byte. Raises `CheckpointError` if they are missing
    or of another shape.
    """
    found: dict[Path, dict[int, TensorEntry]] = {}
    for name, entry in entries.items():
        if entry.dtype is not STORED:
            continue
        blocks = tuple(-(-size // BLOCK) for size in entry.shape)
        scales = entries.get(name + _SCALES)
        if len(blocks) != 2 or scales is None or scales.shape != blocks or scales.dtype is not torch.float32:
            raise CheckpointError(f"{directory} lacks {name}{_SCALES}, the float32 scales {list(blocks)} of {name}")
        found.setdefault(entry.path, {})[entry.start] = scales
    return found


def names_of_scales(entries: Mapping[str, TensorEntry]) -> set[str]:
    """Return the names of the tensors that hold scales."""
    return {name + _SCALES for name, entry in entries.items() if entry.dtype is STORED} & entries.keys()


def dequantised(rows: Tensor, scales: TensorEntry, start: int) -> Tensor:
    """Return the values of float8 `rows`, the first of which is row `start` of the matrix."""
    first, last = start // BLOCK, -(-(start + len(rows)) // BLOCK)
    factors = read_rows(scales, first, last).repeat_interleave(BLOCK, 0)[start - first * BLOCK :][: len(rows)]
    return (rows.float() * factors.repeat_interleave(BLOCK, 1)[:, : rows.shape[1]]).to(RESULT)
