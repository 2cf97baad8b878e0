"""Open the model that a verb names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from core.errors import ConfigError, UnreadableFileError
from core.files import read_json
from model.huggingface import FAMILIES
from parallel.comm.world import World
from precision.config import Backend
from train.checkpoint.reader import IMPORTED
from train.eval.contamination import MODELS
from train.eval.scoring_model import ScoringModel, from_directory, from_run, from_transformers

_ADAPTER = "adapter_config.json"


def open_scoring_model(path: Path, world: World, backend: Backend | None = None) -> ScoringModel:
    """Open a run's model, an imported model or a Hugging Face model. Transformers opens a Hugging Face model of an
    architecture that is not ours. Models that are not runs compute in float32, those of transformers on a GPU in
    bfloat16.

    Raises `ConfigError` if `backend` is given for a model that is not a run.
    """
    if (path / "config.yaml").exists():
        return from_run(path, world, backend, MODELS)
    if backend is not None:
        reason = "applies to runs only: any other model is evaluated in float32, by PyTorch; remove it"
        raise ConfigError("backend", backend, reason)
    return from_directory(path, world.device) if is_ours(path) else open_foreign(path, world)


def is_ours(path: Path) -> bool:
    """Return whether our own network computes the model of a directory. True for one that cannot be read: opening it
    then says why.
    """
    if (path / IMPORTED).exists() or not (path / "config.json").exists():
        return True
    try:
        kind = read_json(path / "config.json", {"model_type": str})["model_type"]
    except (OSError, UnreadableFileError):
        return True
    return kind in FAMILIES


def open_foreign(path: Path, world: World) -> ScoringModel:
    """Open a directory of the Hugging Face format by transformers, in one process. Raises `ConfigError` (key `run`)."""
    if world.size > 1:
        raise ConfigError("launch.kind", None, "transformers computes this model, in one process: remove it")
    if (path / _ADAPTER).exists():  # it names a base model, which may be anywhere
        raise ConfigError("run", str(path), "is an adapter: merge it into its base model, and save the whole model")
    if find_spec("transformers") is not None:
        from transformers.utils import logging

        logging.disable_progress_bar()
    try:
        return from_transformers(str(path), world.device)
    except ConfigError as error:
        raise error.under("run") from None
