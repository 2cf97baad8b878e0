"""A finished or running run's model, read back from its directory for the verbs that look at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.errors import CheckpointError
from data.corpus import Corpus
from data.loader import Loader
from model.transformer import Transformer
from parallel.apply import build
from parallel.layout import ParallelConfig
from parallel.mesh import make_meshes
from parallel.world import World
from train.checkpoint import Checkpointer, committed_checkpoints
from train.config import Phase, TrainConfig, phases
from train.corpora import check_same_data, get_corpus, source_weights
from train.run_directory import RunDirectory, load_config


@dataclass(frozen=True)
class Restored:
    config: TrainConfig
    model: Transformer
    corpus: Corpus
    step: int

    @property
    def phase(self) -> Phase:
        """The stretch in which the checkpoint was made."""
        return next(phase for phase in phases(self.config) if self.step <= phase.stop)

    def loader(self) -> Loader:
        return Loader(self.corpus, self.phase.context, self.phase.global_batch, self.config.run.seed)

    def weights(self) -> dict[str, float]:
        return source_weights(self.config, self.corpus)


def restore(directory: Path, world: World) -> Restored:
    """The model of the run's newest whole checkpoint and the corpus it was trained on."""
    config = load_config(directory)
    run = RunDirectory(directory)
    checkpointer = Checkpointer(run.checkpoints, world, config.checkpoint.keep, False, print)
    if not committed_checkpoints(run.checkpoints):
        raise CheckpointError(f"{directory} has no checkpoint yet")
    corpus = get_corpus(config, world, lambda line: None)
    layout = ParallelConfig().resolve(world.size)  # whatever the run was trained on
    model, _ = build(config.model, layout, config.precision, make_meshes(layout, world), world.device, config.run.seed)
    progress = checkpointer.restore(model, None) or {}
    check_same_data(progress, corpus)
    return Restored(config, model, corpus, progress["step"])
