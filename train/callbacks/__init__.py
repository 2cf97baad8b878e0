"""Make the callbacks, which run before and after steps: the built-in ones (such as logging) and the user's."""

from __future__ import annotations

from collections.abc import Iterator

from core.errors import ConfigError
from core.import_path import load
from core.package_guard import PACKAGES
from train.callbacks.base import Callback, TrainingRun
from train.callbacks.checkpoint import CheckpointCallback
from train.callbacks.evaluation import EvaluationCallback
from train.callbacks.logging import LoggingCallback
from train.callbacks.online_filter import OnlineFilterCallback
from train.callbacks.profiler import ProfilerCallback
from train.callbacks.retrieval import RetrievalCallback
from train.callbacks.suites import SuiteCallback
from train.callbacks.summary import SummaryCallback
from train.config import Objective, TrainConfig


def make_callbacks(trainer: TrainingRun) -> list[Callback]:
    """Make the callbacks of a run, in the order in which they are called. The user's callbacks come before logging,
    which writes their metrics. The callback that writes the summary and the report comes last.
    """
    config = trainer.config
    logging, imported = LoggingCallback(trainer), []
    for path, found in imported_callbacks(config):
        imported.append(found(trainer))
        imported[-1].key = path
    match config.training.objective:
        case Objective.language:
            evaluation = EvaluationCallback(trainer, logging)
        case Objective.contrastive:
            evaluation = RetrievalCallback(trainer, logging)
    return [
        *([OnlineFilterCallback(trainer)] if config.online.every else []),
        *imported,
        logging,
        CheckpointCallback(trainer),
        evaluation,
        *([SuiteCallback(trainer, logging)] if config.evaluation.suites else []),
        *([ProfilerCallback(trainer)] if config.profile.steps else []),
        SummaryCallback(trainer, logging, evaluation),
    ]


def imported_callbacks(config: TrainConfig) -> Iterator[tuple[str, type[Callback]]]:
    """Yield the import path and the class of each callback in the key `callbacks`. Raises `ConfigError` for a callback
    that cannot be imported, is not a subclass of `Callback`, does not take its options or is part of Leviathan.
    """
    for place, one in enumerate(config.callbacks):
        key = f"callbacks.{place}"
        found = load(one.target, key, None, options=one.options, base=Callback)
        if one.target.partition(".")[0] in PACKAGES:
            raise ConfigError(key, one.target, "is part of Leviathan, which has configuration keys for it; remove it")
        yield one.target, found
