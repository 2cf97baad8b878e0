"""The verbs `import` and `export`: a model from and to the Hugging Face format, a block at a time."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError, ConfigError
from core.files import new_directory
from data.tokenizer import save_for_transformers
from model.huggingface import HuggingFaceCheckpoint, compare_logits, compare_settings, export, obstacle, shortage
from model.huggingface.checkpoint import TOKENIZER_FILES
from model.multipliers import folded
from model.tensor_source import TensorSource
from parallel.comm.world import World
from train.checkpoint.init_from import open_model
from train.checkpoint.manager import progress_of
from train.checkpoint.reader import IMPORTED, TOKENIZER, StoredModel, load_origin, save_model
from train.config import phases
from train.corpus import check_same_data, stored_corpus
from train.run_directory import load_config

CARRIED = (
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "router_aux_loss_coef",
    "attention_dropout",
)
"""Keys of `config.json` that say nothing about the network and are handed on as they are."""


class Check(Enum):
    """Compare settings and logits with transformers'. `auto`: where it is installed; logits, where both models fit into
    memory. What was not compared is said, and written beside an imported model.
    """

    auto = "auto"
    always = "always"
    never = "never"


@dataclass(frozen=True)
class ImportConfig:
    """A checkpoint in the Hugging Face format becomes one of ours: `model.init_from=OUT` starts from it."""

    source: str = "???"
    """Directory with `config.json` and safetensors files."""
    out: str = "???"
    """New directory."""
    text_only: bool = False
    """Leave a vision tower out."""
    check: Check = Check.auto


class Format(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class ExportConfig:
    """A run's newest checkpoint, or an imported model, becomes a directory that transformers loads."""

    source: str = "???"
    """A run's directory or an imported one."""
    out: str = "???"
    """New directory."""
    family: str | None = None
    """`model_type` to write; null: the first that expresses the model exactly."""
    dtype: Format | None = None
    """Format of the weights; null: as stored."""
    shard_gb: float = 5.0
    """Files are split where they would become larger than this."""
    drop_selection_bias: bool = False
    """Export a model whose routers were balanced by selection biases without them."""
    check: Check = Check.auto

    def __post_init__(self) -> None:
        if self.shard_gb <= 0:
            raise ConfigError("shard_gb", self.shard_gb, "must be positive", [5])


def run_import(config: ImportConfig) -> int:
    out = _new(config.out)
    source = HuggingFaceCheckpoint(Path(config.source).expanduser(), config.text_only)
    checked = _compare(source, source.directory, None, config.check)
    text = source.raw_config.get("text_config") or source.raw_config
    carried = {key: text[key] for key in CARRIED if key in text}
    origin = {"family": source.family.model_type, "checked": checked, "config": carried}
    with new_directory(out, exclusive=True) as scratch:
        save_model(source, scratch, origin, _Progress("imported", source))
        (scratch / TOKENIZER).mkdir()
        for path in source.tokenizer_files:
            shutil.copyfile(path, scratch / TOKENIZER / path.name)
    print(f"imported {source.family.model_type} to {out}; start from it with model.init_from={out}")
    return 0


def run_export(config: ExportConfig) -> int:
    out, path = _new(config.out), Path(config.source).expanduser()
    source = _opened(path)
    bias = source.selection_bias() if isinstance(source, StoredModel) else 0.0
    if bias and not config.drop_selection_bias:
        reason = f"the routers choose experts with biases (up to {bias:.2g}) that other formats cannot store"
        raise ConfigError("drop_selection_bias", False, reason, ["true, which exports the model without them"])
    dtype = None if config.dtype is None else getattr(torch, config.dtype.value)
    family, extra = config.family, dict[str, Any]()
    if (path / IMPORTED).exists():
        origin, extra = load_origin(path)
        family = family or origin

    with tempfile.TemporaryDirectory() as scratch:
        files, of_run = _tokenizer(path, source, Path(scratch))
        export(
            source,
            out,
            family,
            dtype,
            shard_bytes=int(config.shard_gb * 1e9),
            extra_config={**extra, **of_run},
            tokenizer_files=files,
            verify=lambda directory: _compare(source, directory, dtype, config.check),
            progress=_Progress("exported", source, dtype),
        )
    print(f"exported {json.loads((out / 'config.json').read_text())['model_type']} to {out}")
    return 0


def _opened(path: Path) -> TensorSource:
    try:
        return open_model(path)
    except ConfigError as error:
        raise error.under("source") from None


def _new(path: str) -> Path:
    out = Path(path).expanduser()
    if out.exists():
        raise ConfigError("out", path, "exists already; name a new directory")
    return out


def _tokenizer(path: Path, source: TensorSource, scratch: Path) -> tuple[list[Path], dict[str, Any]]:
    """Files of the model's tokenizer, and what a run knows that `config.json` should name. Raises `ConfigError` where
    the run's data have changed: another tokenizer may have been trained on them.
    """
    if (path / IMPORTED).exists():
        return [path / TOKENIZER / name for name in TOKENIZER_FILES if (path / TOKENIZER / name).exists()], {}
    if not (path / "config.yaml").exists():
        return [file for name in TOKENIZER_FILES if (file := path / name).exists()], {}
    run = load_config(path)
    corpus = stored_corpus(path, run, World(0, 1, torch.device("cpu")), print)
    assert isinstance(source, StoredModel)
    check_same_data(progress_of(source.checkpoint), corpus)
    try:
        ids = save_for_transformers(corpus.tokenizer, scratch)
    except ConfigError as error:
        print(f"no tokenizer exported: {error}")
        return [], {}
    longest = max(phase.seq_len for phase in phases(run))
    return sorted(scratch.iterdir()), {**ids, "max_position_embeddings": longest}


def _compare(source: TensorSource, directory: Path, dtype: torch.dtype | None, check: Check) -> str:
    """Compare what can be compared here, print which that is, and return it."""
    unasked = "check=never" if check is Check.never else obstacle(directory)
    if unasked is None:
        compare_settings(folded(source).config, directory)
    why = unasked or shortage(source)
    if why is None:
        checked = (
            f"settings and logits equal transformers' to {compare_logits(source, directory, dtype):.1e} of the largest"
        )
    elif check is Check.always:
        raise CheckpointError(f"cannot compare with transformers: {why}; check=never converts without")
    elif unasked is None:
        checked = f"settings equal transformers'; logits not compared: {why}"
    else:
        checked = f"neither settings nor logits compared with transformers: {why}"
    print(checked)
    return checked


class _Progress:
    """A line that counts bytes, at most ten times a second."""

    def __init__(self, verb: str, source: TensorSource, dtype: torch.dtype | None = None) -> None:
        self.verb, self.done, self.last = verb, 0, 0.0
        sizes = ((dtype or source.dtypes[n]).itemsize * torch.Size(s).numel() for n, s in source.shapes.items())
        self.total = max(sum(sizes), 1)

    def __call__(self, size: int) -> None:
        self.done += size
        now = time.monotonic()
        if sys.stderr.isatty() and (now - self.last > 0.1 or self.done >= self.total):
            self.last = now
            end = "\n" if self.done >= self.total else ""
            print(f"\r{self.verb} {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB", end=end, file=sys.stderr)
