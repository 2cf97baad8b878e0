"""Filter online: before each window of `online.every` steps, the model in training scores the window's candidates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from data.sampling import key_of
from parallel.parallelize import ParallelModel
from train.callbacks.base import Callback, TrainingRun
from train.config import Phase
from train.eval.held_out import sequence_losses
from train.metrics import append_or_log
from train.online_filter import OnlineFilter, OnlineWindow


class OnlineFilterCallback(Callback):
    """Selects the sequences of each window and appends the window to `online.jsonl`. The verb `explain` reads this file
    to find the steps that trained on a document.
    """

    key = "online_filter"

    def __init__(self, trainer: TrainingRun) -> None:
        super().__init__(trainer)
        self.window = OnlineWindow()
        self._scoring_s, self._since = 0.0, time.perf_counter()

    def before_step(self, step: int) -> None:
        trainer, config, last = self.trainer, self.trainer.config.online, self.window
        phase = trainer.phase(step)
        if (step - phase.start) % config.every:
            return
        if step == phase.start:
            last = OnlineWindow(generation=last.generation)
        key = key_of(trainer.config.run.seed, "online", phase.name)
        filter_ = OnlineFilter(config, phase.global_batch_size, key, partial(self._losses, phase, step))
        before = trainer.paused_s
        with trainer.pause():
            self.window = window = filter_.next(last, step, min(config.every, phase.stop - step))
        trainer.batches.select(window)
        seconds = trainer.paused_s - before
        self._scoring_s += seconds
        if trainer.world.is_main:
            line = {"phase": phase.name, "seconds": round(seconds, 3), **vars(window)}
            append_or_log(trainer.directory.online, line, trainer.log)
        trainer.log(
            f"online filter {window.generation}: {len(window.rows):,} sequences taken, "
            f"{window.cursor - last.cursor:,} new candidates, loss threshold {window.threshold:.3f}"
        )

    def metrics(self) -> dict[str, float]:
        now = time.perf_counter()
        share = self._scoring_s / max(now - self._since, 1e-9)
        self._scoring_s, self._since = 0.0, now
        return {"scoring_share": round(share, 4)}

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self.window))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window = OnlineWindow(**state)
        self.trainer.batches.select(self.window)

    def _losses(self, phase: Phase, step: int, ordinals: Sequence[int]) -> Any:
        loader = self.trainer.loaders[phase.name]
        placed, count, size = self.trainer.engine.placed, len(ordinals), phase.micro_batch_size
        assert isinstance(placed, ParallelModel)
        take = lambda a, b: loader.samples(ordinals[a:b], step - phase.start)  # noqa: E731
        return sequence_losses(placed, take, count, size).cpu().numpy()
