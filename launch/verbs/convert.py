"""The verbs `import` and `export`: convert a model from and to the Hugging Face format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from core.errors import ConfigError
from core.files import local_path
from train.config import Check


@dataclass(frozen=True)
class ImportConfig:
    """Convert a checkpoint from the Hugging Face format to Leviathan's. Train from it with `model.init_from=OUT`."""

    source: str = "???"
    """Directory with `config.json` and safetensors files."""
    out: str = "???"
    """New directory."""
    text_only: bool = False
    """Ignore the vision tower of a multimodal checkpoint."""
    check: Check = Check.auto


class Format(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class ExportConfig:
    """Convert a run's newest checkpoint, or an imported model, to a directory that transformers loads."""

    source: str = "???"
    """Directory of a run or of an imported model."""
    out: str = "???"
    """New directory."""
    family: str | None = None
    """`model_type` to write; null: the first that expresses the model exactly."""
    dtype: Format | None = None
    """Dtype of the weights; null: as stored."""
    shard_gb: float = 5.0
    """Largest size of a file, in GB."""
    drop_selection_bias: bool = False
    """Omit the selection biases that balanced the routers in training."""
    check: Check = Check.auto

    def __post_init__(self) -> None:
        if self.shard_gb <= 0:
            raise ConfigError("shard_gb", self.shard_gb, "must be positive", [5])


def run_import(config: ImportConfig) -> int:
    from train.convert import import_checkpoint

    out = _new_directory(config.out)
    family = import_checkpoint(Path(config.source).expanduser(), out, config.text_only, config.check)
    print(f"imported {family} to {out}; start from it with model.init_from={out}")
    return 0


def run_export(config: ExportConfig) -> int:
    import torch

    from train.convert import export_checkpoint

    out = _new_directory(config.out)
    dtype = None if config.dtype is None else getattr(torch, config.dtype.value)
    family = export_checkpoint(
        Path(config.source).expanduser(),
        out,
        config.family,
        dtype,
        int(config.shard_gb * 1e9),
        config.drop_selection_bias,
        config.check,
    )
    print(f"exported {family} to {out}")
    return 0


def _new_directory(path: str) -> Path:
    out = local_path("out", path)
    if os.path.lexists(out):
        raise ConfigError("out", path, "exists already; name a new directory")
    return out
