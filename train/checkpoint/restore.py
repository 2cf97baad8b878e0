"""Restore the model of a finished or running run from its directory, for the verbs that evaluate it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from core.errors import CheckpointError, ConfigError
from data.corpus import Corpus
from data.filter.score.factory import Models
from data.loader import Loader
from data.tokenizer import Tokenizer
from parallel.comm.world import World
from parallel.deepspeed.config import ZeroConfig
from parallel.layout import EngineKind, Layout, ParallelConfig
from parallel.mesh import make_meshes
from parallel.parallelize import ParallelModel, build
from precision.config import Backend
from train.checkpoint.index import check_run
from train.checkpoint.manager import Checkpointer
from train.checkpoint.state import run_state
from train.config import Phase, TrainConfig, check_language, phase_of
from train.corpus import run_tokenizer, source_weights, trained_corpus
from train.run_directory import RunDirectory, committed, load_config


@dataclass(frozen=True)
class RestoredRun:
    config: TrainConfig
    placed: ParallelModel
    tokenizer: Tokenizer
    step: int
    open_corpus: Callable[[], Corpus]
    """Opens the corpus that the model was trained on. Raises `ConfigError` if it is missing or has changed."""

    @cached_property
    def corpus(self) -> Corpus:
        return self.open_corpus()

    @property
    def phase(self) -> Phase:
        """The phase in which the checkpoint was saved."""
        return phase_of(self.config, self.step)

    def loader(self) -> Loader:
        return Loader(self.corpus, self.phase.seq_len, self.phase.global_batch_size, self.config.run.seed)

    def weights(self) -> dict[str, float]:
        return source_weights(self.config, self.corpus)


def restore(
    directory: Path,
    world: World,
    backend: Backend | None = None,
    models: Models | None = None,
    tokens: str | None = None,
) -> RestoredRun:
    """Restore the model from the run's newest intact checkpoint.

    `backend`: the GEMM backend; None: the one used in training. `models`: as in `get_corpus`. `tokens`: the directory
    of the run's tokens; None: as in the run.
    """
    stored = config = load_config(directory)
    check_language(config, "run", str(directory))
    if tokens is not None:
        config = replace(config, data=replace(config.data, tokens=tokens))
    if backend is not None:
        config = replace(config, precision=replace(config.precision, backend=backend))
    run = RunDirectory(directory, config.checkpoint.directory)
    checkpointer = Checkpointer(run.checkpoints, world, config.checkpoint.keep, False, partial(_report, world))
    if not committed(run.checkpoints):
        raise CheckpointError(f"{directory} has no checkpoint yet")
    world.from_main(lambda: check_run(stored, run.checkpoints))
    # without training FSDP2 is enough, and it reads the checkpoints of both engines
    meshes = make_meshes(replace(_layout(config, world), engine=EngineKind.fsdp2, zero=ZeroConfig()), world)
    placed = build(config.model, config.precision, meshes, world.device, config.run.seed)
    progress = checkpointer.restore(run_state(placed.model, None, placed.specs)) or {}
    placed.model.set_rope_config(phase_of(config, progress["step"]).model)
    open_corpus = partial(trained_corpus, directory, config, world, progress, models)
    return RestoredRun(config, placed, run_tokenizer(directory, progress, open_corpus), progress["step"], open_corpus)


def _report(world: World, line: str) -> None:
    """Print on standard error, because a script may parse a verb's standard output."""
    if world.is_main:
        print(line, file=sys.stderr)


def _layout(config: TrainConfig, world: World) -> Layout:
    """Return the run's own layout if it fits the number of ranks, and plain data parallelism otherwise."""
    try:
        return config.parallel.resolve(world.size)
    except ConfigError:
        return ParallelConfig().resolve(world.size)
