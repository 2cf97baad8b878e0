"""The verb `train`: train a model, or several where keys have several values."""

from __future__ import annotations

from launch.local import read_stored
from launch.local import train as run
from train.config import TrainConfig

__all__ = ["TrainConfig", "read_stored", "run"]
