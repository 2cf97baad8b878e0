"""A run grown along one axis, all else in proportion, and its base."""

from __future__ import annotations

from dataclasses import replace

from core.errors import ConfigError
from hparam.axes import SizeAxis, grown
from hparam.rules import Parametrization
from train.config import TrainConfig
from train.metap.hyperparameters import as_base, resolve


def grown_run(config: TrainConfig, axis: SizeAxis, factor: int) -> TrainConfig:
    """`factor` times as large along `axis`. A larger batch trains on as many tokens, a longer run in as large steps;
    warmup keeps its share. Raises `ConfigError` where steps do not divide.
    """
    training, schedule = config.training, config.schedule
    if axis is SizeAxis.batch:
        if training.steps % factor:
            reason = f"must be a multiple of {factor}, or a batch of {factor} times as many rows has other tokens"
            raise ConfigError("training.steps", training.steps, reason)
        training = replace(
            training, global_batch_size=training.global_batch_size * factor, steps=training.steps // factor
        )
        schedule = replace(schedule, warmup_steps=round(schedule.warmup_steps / factor))
    elif axis is SizeAxis.tokens:
        training = replace(training, steps=training.steps * factor)
        schedule = replace(schedule, warmup_steps=schedule.warmup_steps * factor)
    return replace(config, model=grown(config.model, axis, factor), training=training, schedule=schedule)


def carried(config: TrainConfig, axis: SizeAxis, factor: int, rules: Parametrization) -> TrainConfig:
    """The run grown from itself as base, its hyperparameters carried over by `rules`. A base that it names is kept."""
    larger = grown_run(as_base(config), axis, factor)
    return resolve(replace(larger, hparam=replace(larger.hparam, rules=rules)))
