"""A callback with state, and a metric."""

from __future__ import annotations

from typing import Any

import torch

from train.callbacks.base import Callback, TrainingRun
from train.metrics import StepMetrics


class LossAverage(Callback):
    """Log the exponential moving average of the loss, which continues after an interruption."""

    def __init__(self, trainer: TrainingRun, decay: float = 0.9) -> None:
        super().__init__(trainer)
        self.decay, self.average = decay, 0.0

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        self.average = self.decay * self.average + (1 - self.decay) * metrics.loss.item()

    def metrics(self) -> dict[str, float]:
        return {"loss_average": self.average}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


class WeightNorm(Callback):
    """Log the norm of all weights. Each rank sums the squares of the blocks that it owns."""

    def metrics(self) -> dict[str, float]:
        squares = torch.zeros((), dtype=torch.float64, device=self.trainer.world.device)
        for shard in self.trainer.engine.weights():
            if shard.spec.is_owner:
                squares += shard.values.double().square().sum()
        self.trainer.meshes.world.sum(squares, "weight norm")
        return {"weight_norm": squares.sqrt().item()}
