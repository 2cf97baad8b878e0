"""The verb `train`: train a model, or one per combination of values if keys have several values."""

from __future__ import annotations

from launch.local import checked, read_stored
from launch.local import train as run
from train.config import TrainConfig

__all__ = ["TrainConfig", "checked", "read_stored", "run"]
