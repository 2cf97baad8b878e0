"""Stub until the Transformer Engine backend is written."""

from __future__ import annotations

import torch

from precision.backend import GemmBackend
from precision.config import Recipe

RECIPES: tuple[Recipe, ...] = (Recipe.blockwise, Recipe.tensorwise, Recipe.mxfp8)


def unavailable(recipe: Recipe, device: torch.device) -> list[str]:
    return ["needs a CUDA device"]


def version() -> str:
    return "transformer-engine"


def make(recipe: Recipe, compute_dtype: torch.dtype, where: str) -> GemmBackend:
    raise NotImplementedError
