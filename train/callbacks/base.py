"""The interface between a run and its callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from data.corpus import Corpus
from data.loader import Loader
from parallel.comm.world import World
from parallel.mesh import Meshes
from train.batches import StepBatches
from train.checkpoint.manager import Checkpointer
from train.config import Phase, TrainConfig
from train.engine.base import Engine
from train.metrics import Log, StepMetrics
from train.run_directory import RunDirectory
from train.stragglers import Stragglers


class TrainingRun(Protocol):
    """What callbacks use of a run: `train.trainer.Trainer`."""

    config: TrainConfig
    world: World
    directory: RunDirectory
    corpus: Corpus
    log: Log
    meshes: Meshes
    engine: Engine
    loaders: dict[str, Loader]
    batches: StepBatches
    weights: dict[str, float]
    """Shares of the sources in `data.sources`."""
    checkpointer: Checkpointer
    stragglers: Stragglers
    step: int
    """Optimizer steps done."""
    tokens: int
    paused_s: float
    """Seconds spent in `pause` so far."""

    @property
    def callbacks(self) -> Sequence[Callback]: ...

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""

    def phase(self, step: int) -> Phase:
        """Return the phase of `step`, counted from 0."""

    def save(self) -> None:
        """Start a checkpoint."""

    def pause(self) -> AbstractContextManager[None]:
        """Exclude what runs inside from the run's throughput and traffic."""


class Callback:
    """Runs code around the steps of a run. Every method is called on every rank, so it may use collectives.

    A subclass of your own is named by `callbacks=[my.module:Mine]`; its constructor takes the run and the options.
    """

    key = ""
    """Name of the callback's state in a checkpoint; for an imported callback its import path."""

    def __init__(self, trainer: TrainingRun) -> None:
        self.trainer = trainer

    def before_training(self) -> None:
        """Run once before the first step, after `load_state_dict`."""

    def before_step(self, step: int) -> None:
        """`step` counts from 0."""

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        """`steps` counts the steps done, this one included. Reading a tensor of `metrics` waits for the device."""

    def metrics(self) -> Mapping[str, float]:
        """Return figures for the line that is logged after this step, every `logging.every` steps."""
        return {}

    def at_end(self) -> None:
        """Run after the last step of the whole run, not after an interruption."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain JSON values. Checkpoints keep that of rank 0."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of the checkpoint that the run resumes from."""
