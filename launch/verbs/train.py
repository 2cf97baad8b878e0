"""The verb `train`: train a model, or several where keys have several values."""

from __future__ import annotations

from launch.local import train
from train.config import TrainConfig


def run(configs: list[TrainConfig]) -> int:
    return train(configs)
