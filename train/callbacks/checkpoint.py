"""Save a checkpoint every `checkpoint.every` steps and at the end."""

from __future__ import annotations

from train.callbacks.base import Callback
from train.metrics import StepMetrics


class CheckpointCallback(Callback):
    only_reports = True

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        every = self.trainer.config.checkpoint.every
        if every and steps % every == 0 and steps != self.trainer.steps:
            with self.trainer.pause():
                self.trainer.save()

    def at_end(self) -> None:
        if self.trainer.step and not self.trainer.checkpointer.has(self.trainer.step):
            self.trainer.save()
        self.trainer.checkpointer.wait()
