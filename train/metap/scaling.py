"""Make a larger run along one axis of size, and transfer hyperparameters to it."""

from __future__ import annotations

from dataclasses import replace

from core.errors import ConfigError
from hparam.axes import SizeAxis, grown
from hparam.rules import Parametrization
from train.config import TrainConfig
from train.metap.hyperparameters import as_base, resolve


def grown_run(config: TrainConfig, axis: SizeAxis, factor: int) -> TrainConfig:
    """Return the run `factor` times as large along `axis`. A larger batch keeps the number of tokens; a longer run
    keeps the batch. Warmup keeps its fraction of the steps. Raises `ConfigError` if `factor` does not divide the steps.
    """
    training, schedule = config.training, config.schedule
    if axis is SizeAxis.batch:
        if training.steps % factor:
            reason = f"must be a multiple of {factor}, so that the larger batch trains on the same tokens"
            raise ConfigError("training.steps", training.steps, reason)
        size, steps = training.global_batch_size * factor, training.steps // factor
        training = replace(training, global_batch_size=size, steps=steps)
        schedule = replace(schedule, warmup_steps=round(schedule.warmup_steps / factor))
    elif axis is SizeAxis.tokens:
        training = replace(training, steps=training.steps * factor)
        schedule = replace(schedule, warmup_steps=schedule.warmup_steps * factor)
    return replace(config, model=grown(config.model, axis, factor), training=training, schedule=schedule)


def carried(config: TrainConfig, axis: SizeAxis, factor: int, rules: Parametrization) -> TrainConfig:
    """Return the grown run, with hyperparameters transferred by `rules` from the run's base, or else from the run."""
    larger = grown_run(as_base(config), axis, factor)
    return resolve(replace(larger, hparam=replace(larger.hparam, rules=rules)))
