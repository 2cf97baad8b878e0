"""Open the model that a verb names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from core.errors import ConfigError
from parallel.comm.shares import Shares
from parallel.comm.world import World
from precision.config import Backend
from train.eval.contamination import MODELS
from train.eval.scoring_model import ScoringModel, from_directory, from_run


def open_scoring_model(path: Path, world: World, backend: Backend | None = None) -> ScoringModel:
    """Open a run's model, an imported model or a Hugging Face model. Models that are not runs compute in float32, and
    every rank has the whole model.

    Raises `ConfigError` if `backend` is given for a model that is not a run.
    """
    if (path / "config.yaml").exists():
        return from_run(path, world, backend, MODELS)
    if backend is not None:
        reason = "applies to runs only: any other model is evaluated in float32, by PyTorch; remove it"
        raise ConfigError("backend", backend, reason)
    return replace(from_directory(path, world.device), shares=Shares(world, world.size, world.rank))
