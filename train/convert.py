"""Convert a model from and to the Hugging Face format, a block at a time."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError, ConfigError
from core.files import new_directory, write_json
from data.tokenizer import save_for_transformers
from model.huggingface import HuggingFaceCheckpoint, compare_logits, compare_settings, export, obstacle, shortage
from model.huggingface.checkpoint import tokenizer_files
from model.huggingface.vision import processor_files
from model.multipliers import fold_multipliers
from model.tensor_source import TensorSource, selection_biases
from parallel.comm.world import World
from train.checkpoint.index import read_progress
from train.checkpoint.init_from import open_model
from train.checkpoint.reader import IMPORTED, TOKENIZER, CheckpointedModel, load_origin, save_model
from train.config import Check, check_language, phases
from train.corpus import run_images, run_tokenizer, trained_corpus
from train.eval.contamination import MODELS
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
"""Keys of `config.json` that do not affect the network; import keeps them and export writes them."""


def import_checkpoint(source_directory: Path, out: Path, text_only: bool = False, check: Check = Check.auto) -> str:
    """Convert a checkpoint in the Hugging Face format to an imported model. Return the family's `model_type`."""
    source = HuggingFaceCheckpoint(source_directory, text_only)
    tokenizer = source.tokenizer_files
    checked = _compare(source, source.directory, None, check)
    text = source.raw_config.get("text_config") or source.raw_config
    carried = {key: text[key] for key in CARRIED if key in text}
    origin = {"family": source.family.model_type, "checked": checked, "config": carried}
    with new_directory(out, exclusive=True) as scratch:
        save_model(source, scratch, origin, _Progress("imported", source))
        (scratch / TOKENIZER).mkdir()
        for path in tokenizer:
            shutil.copyfile(path, scratch / TOKENIZER / path.name)
    return source.family.model_type


def export_checkpoint(
    path: Path,
    out: Path,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    drop_selection_bias: bool = False,
    check: Check = Check.auto,
) -> str:
    """Convert a run's newest checkpoint or an imported model to the Hugging Face format. Return its `model_type`."""
    try:
        source = open_model(path)
    except ConfigError as error:
        raise error.under("source") from None
    if (path / "config.yaml").exists():
        check_language(load_config(path), "source", str(path))
    biases = selection_biases(source).values()
    bias = 0.0 if source.config.router.selection_bias else max((float(one.abs().max()) for one in biases), default=0.0)
    if bias and not drop_selection_bias:
        reason = f"the routers choose experts with biases (up to {bias:.2g}) that other formats cannot store"
        raise ConfigError("drop_selection_bias", False, reason, ["true, which exports the model without them"])
    extra = dict[str, Any]()
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
            shard_bytes=shard_bytes,
            extra_config={**extra, **of_run},
            tokenizer_files=files,
            verify=lambda directory: _compare(source, directory, dtype, check),
            progress=_Progress("exported", source, dtype),
        )
    return str(json.loads((out / "config.json").read_text())["model_type"])


def _tokenizer(path: Path, source: TensorSource, scratch: Path) -> tuple[list[Path], dict[str, Any]]:
    """Return the files of the model's tokenizer, and the entries of `config.json` that follow from a run. Raises
    `ConfigError` if the run's data have changed, because the tokenizer may have been trained on them.
    """
    imported = (path / IMPORTED).exists()
    if imported or not (path / "config.yaml").exists():
        folder = path / TOKENIZER if imported else path
        return tokenizer_files(folder), {}
    run = load_config(path)
    assert isinstance(source, CheckpointedModel)
    progress = read_progress(source.checkpoint)
    corpus = partial(trained_corpus, path, run, World(0, 1, torch.device("cpu")), progress, MODELS)
    tokenizer = run_tokenizer(path, progress, corpus)
    try:
        ids = save_for_transformers(tokenizer, scratch)
    except ConfigError as error:
        print(f"no tokenizer exported: {error}")
        return [], {}
    if (images := run_images(path)) is not None and source.config.vision is not None:
        tiles = images.tiles
        files = processor_files(source.config.vision, tiles.max_tiles, tiles.resize_to_max_canvas)
        for name, content in files.items():
            write_json(scratch / name, content)
    longest = max(phase.seq_len for phase in phases(run))
    return sorted(scratch.iterdir()), {**ids, "max_position_embeddings": longest}


def _compare(source: TensorSource, directory: Path, dtype: torch.dtype | None, check: Check) -> str:
    """Compare with transformers what `check` and this machine allow. Print and return a sentence with the result."""
    unasked = "check=never" if check is Check.never else obstacle(directory)
    if unasked is None:
        compare_settings(fold_multipliers(source).config, directory)
    why = unasked or shortage(source)
    if why is None:
        checked = (
            f"settings and logits equal transformers' to {compare_logits(source, directory, dtype):.1e} "
            "of the largest logit"
        )
    elif check is Check.always:
        raise CheckpointError(f"cannot compare with transformers: {why}; check=never converts without it")
    elif unasked is None:
        checked = f"settings equal transformers'; logits not compared: {why}"
    else:
        checked = f"neither settings nor logits compared with transformers: {why}"
    print(checked)
    return checked


class _Progress:
    """Prints a line with the bytes converted so far, at most ten times a second, if stderr is a terminal."""

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
