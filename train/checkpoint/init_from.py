"""Load initial weights from a run, an imported model, or a model in the Hugging Face format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from core.errors import CheckpointError, ConfigError
from data.tokenizer import vocabulary_of_file
from model.config import FeedForward, ModelConfig
from model.huggingface import HuggingFaceCheckpoint, model_differences
from model.tensor_source import Shape, TensorSource
from model.upcycle import Upcycled, keeps_the_function
from train.checkpoint.index import check_run, read_progress
from train.checkpoint.reader import IMPORTED, TOKENIZER, CheckpointedModel, load_imported
from train.config import phase_of
from train.contrastive.towers import run_parameters
from train.run_directory import RunDirectory, committed, load_config


def open_model(path: Path, text_only: bool = False) -> TensorSource:
    """Open the model in a directory: a run's newest checkpoint, an imported model or a Hugging Face model. That of a
    contrastive run has the towers' parameters: its encoder has the names of a language model's, its decoder others.
    """
    if not path.is_dir():
        raise ConfigError("", str(path), "no such directory")
    if (path / IMPORTED).exists():
        imported = load_imported(path)
        return _newest(path / "checkpoints", lambda step: imported)
    if (path / "config.yaml").exists():
        config = load_config(path)
        checkpoints = RunDirectory(path, config.checkpoint.directory).checkpoints
        check_run(config, checkpoints)
        shapes = {name: tuple(info.shape) for name, info in run_parameters(config).items()}
        return _newest(checkpoints, lambda step: phase_of(config, step).model, shapes)
    return HuggingFaceCheckpoint(path, text_only)


def initial_source(config: ModelConfig, seed: int, log: Callable[[str], None]) -> TensorSource | None:
    """Open the model of `model.init_from`, upcycled if configured. Raises `ConfigError` if its network differs."""
    if config.init_from is None:
        return None
    try:
        source = open_model(Path(config.init_from).expanduser())
    except ConfigError as error:
        raise error.under("model.init_from") from None
    if "embedding.weight" not in source.shapes:
        raise ConfigError("model.init_from", config.init_from, "has no decoder: it is a contrastive run")
    target = config
    if config.upcycle is not None:
        if any(layer.feed_forward is FeedForward.moe for layer in source.config.blocks):
            raise ConfigError("model.upcycle", None, "init_from is a mixture-of-experts model already; remove upcycle")
        target = replace(config, layer_list=[replace(b, feed_forward=FeedForward.dense) for b in config.blocks])
        if all(layer.feed_forward is FeedForward.moe for layer in config.blocks):
            target = replace(target, dense_hidden_size=source.config.dense_hidden_size)
    different = model_differences(source.config, target)
    if different:
        listed = "; ".join(f"model.{key}={has} there, {wanted} here" for key, (has, wanted) in different.items())
        if any(key.startswith("multipliers.") for key in different):
            listed += "; use hparam=none to keep the model's own multipliers"
        raise ConfigError("model.init_from", config.init_from, f"is another network: {listed}")
    if config.upcycle is not None:
        try:
            source = Upcycled(source, config, seed)
        except ConfigError as error:
            raise error.under("model") from None
        kept = "computes what the dense model does" if keeps_the_function(config) else "starts near the dense model"
        log(f"upcycled {config.init_from} by {config.upcycle.method.value}: {kept}")
    else:
        log(f"initial weights from {config.init_from}")
    return source


@torch.no_grad()
def copy_selection_biases(model: nn.Module, source: TensorSource, log: Callable[[str], None]) -> None:
    """Copy the routers' selection biases, which are buffers, from `source`. Only our own checkpoints contain them."""
    biases = source.selection_biases() if isinstance(source, CheckpointedModel) else {}
    for name, buffer in model.named_buffers():
        if name in biases:
            buffer.copy_(biases[name])
    if any(bias_E.any() for bias_E in biases.values()):
        log("the routers' selection biases are copied")


def compare_vocabularies(source: TensorSource, ours: str, log: Callable[[str], None]) -> None:
    """Log whether the initial weights were trained with this run's vocabulary, whose fingerprint is `ours`."""
    theirs = _vocabulary(source)
    if theirs is None:
        log("initial weights: their tokenizer is unknown; ids must mean the same tokens (data.tokenizer)")
    elif theirs != ours:
        log(
            f"initial weights: they were trained with another tokenizer ({theirs[:12]}) than this run's ({ours[:12]}); "
            "ids must mean the same tokens (data.tokenizer)"
        )
    else:
        log(f"initial weights: trained with this run's tokenizer ({ours[:12]})")


def _vocabulary(source: TensorSource) -> str | None:
    if isinstance(source, Upcycled):
        return _vocabulary(source.dense)
    if isinstance(source, HuggingFaceCheckpoint):
        return vocabulary_of_file(source.directory / "tokenizer.json")
    assert isinstance(source, CheckpointedModel)
    imported = source.checkpoint.parent.parent
    if (imported / IMPORTED).exists():
        return vocabulary_of_file(imported / TOKENIZER / "tokenizer.json")
    return read_progress(source.checkpoint).get("vocabulary")


def _newest(
    checkpoints: Path, model: Callable[[int], ModelConfig], shapes: dict[str, Shape] | None = None
) -> TensorSource:
    """Open the newest checkpoint. `model` returns the configuration of the model for a checkpoint's step. `shapes`: as
    in `CheckpointedModel`.
    """
    present = committed(checkpoints)
    if not present:
        raise CheckpointError(f"{checkpoints} has no checkpoint yet")
    return CheckpointedModel(present[-1].path, model(present[-1].step), shapes)
