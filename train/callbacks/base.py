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
    """The part of a run that callbacks use. `train.trainer.Trainer` implements it."""

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
    """Weight of each source, from `data.sources`."""
    checkpointer: Checkpointer
    stragglers: Stragglers
    step: int
    """Number of optimizer steps done, including those before a resume."""
    tokens: int
    paused_s: float
    """Seconds spent in `pause` so far."""

    @property
    def callbacks(self) -> Sequence[Callback]: ...

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""

    def phase(self, step: int) -> Phase:
        """Return the phase of `step`, counted from 0."""

    def save(self) -> None:
        """Start to save a checkpoint."""

    def pause(self) -> AbstractContextManager[None]:
        """Exclude the `with` block from the run's measured throughput and traffic."""


class Callback:
    """Runs code around the steps of a run. Every method is called on every rank, so it may use collectives.

    `callbacks=[my.module:Mine]` adds a subclass of your own. Its constructor takes the run and the options.
    """

    key = ""
    """Name under which checkpoints hold the callback's state; for an imported callback, its import path."""
    only_reports = False
    """Whether the callback changes nothing that is trained. It does not see steps that recovery repeats on trial."""

    def __init__(self, trainer: TrainingRun) -> None:
        self.trainer = trainer

    def before_training(self) -> None:
        """Run once before the first step, after `load_state_dict`."""

    def before_step(self, step: int) -> None:
        """Run before each step. `step` counts from 0."""

    def after_step(self, steps: int, metrics: StepMetrics) -> None:
        """Run after step number `steps`, counted from 1. Reading a value from `metrics` waits for the device."""

    def metrics(self) -> Mapping[str, float]:
        """Return metrics to add to the logged line, which is written every `logging.every` steps."""
        return {}

    def at_end(self) -> None:
        """Run after the last step of the whole run, not after an interruption."""

    def after_rewind(self) -> None:
        """Run after the run has gone back to a checkpoint, after `load_state_dict`: `trainer.step` is smaller now."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain JSON values. A checkpoint stores the state of rank 0."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state from the checkpoint that the run resumes from."""
