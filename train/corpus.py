"""The corpus of a run, made or opened once and known to every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.files import write_bytes
from data.corpus import Corpus, open_corpus, prepare
from data.curriculum import PhaseSpec, make_loaders
from data.filter.audit.outputs import AUDIT_JSON, AUDIT_PAGE
from data.loader import Loader
from parallel.comm.world import World
from train.config import TrainConfig, phases
from train.online_filter import candidates


def get_corpus(config: TrainConfig, world: World, report: Callable[[str], None]) -> Corpus:
    """Rank 0 tokenises or finds the cache, the others open what it made; hashes are checked by all ranks together.

    Raises `ConfigError` where the vocabulary does not fit the model.
    """
    from train.eval.contamination import MODELS  # which opens runs, and so their corpora

    directory = world.from_main(lambda: prepare(config.data, report, MODELS).directory)
    corpus = open_corpus(directory)
    if config.data.verify:
        corpus.verify(world.rank, world.size)
    size = corpus.tokenizer.vocab_size
    if size > config.model.vocab_size:
        reason = f"the tokenizer has {size} ids; the model needs at least as many rows"
        raise ConfigError("model.vocab_size", config.model.vocab_size, reason, [-(-size // 128) * 128])
    return corpus


def keep_audit(corpus: Corpus, directory: Path) -> None:
    """Copy the audit of the corpus's filter, where it has one, into a run's directory."""
    for name in (AUDIT_JSON, AUDIT_PAGE):
        if (corpus.directory / name).exists():
            write_bytes(directory / name, (corpus.directory / name).read_bytes())


def check_same_data(progress: dict[str, Any], corpus: Corpus) -> None:
    """Refuse to go on with a corpus other than the one that the checkpoint was trained on."""
    if progress["corpus"] != corpus.fingerprint:
        reason = (
            f"the corpus is not the one this run was trained on (now {corpus.fingerprint[:12]}, "
            f"then {progress['corpus'][:12]}); restore the data, or name a new run (run.name)"
        )
        raise ConfigError("data", None, reason)


def source_weights(config: TrainConfig, corpus: Corpus) -> dict[str, float]:
    """Shares of the corpus's sources; those that the configuration does not describe count 1."""
    return {name: config.data.sources[name].weight if name in config.data.sources else 1.0 for name in corpus.sources}


def run_loaders(config: TrainConfig, corpus: Corpus, report: Callable[[str], None]) -> dict[str, Loader]:
    """A loader for each phase of a run. Raises `ConfigError` where the sources do not last to the end."""
    usual = source_weights(config, corpus)
    rows = [
        PhaseSpec(
            phase.name,
            phase.seq_len,
            phase.global_batch_size,
            phase.stop - phase.start,
            candidates(config.online, phase.stop - phase.start, phase.global_batch_size),
            phase.weights or usual,
            f"{phase.key}.steps",
        )
        for phase in phases(config)
    ]
    limits = {name: source.max_epochs for name, source in config.data.sources.items() if source.max_epochs is not None}
    return make_loaders(corpus, rows, config.run.seed, limits, report)
