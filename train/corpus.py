"""Open the corpus of a run on every rank, and make its loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from core.errors import ConfigError, DataError
from core.files import new_directory, read_json, write_json
from data.corpus import Corpus, find_corpus, open_corpus, prepare
from data.curriculum import PhaseSpec, make_loaders
from data.filter.score.factory import Models
from data.images.media import ImageDescription
from data.loader import Loader
from data.tokenizer import Tokenizer, load_tokenizer, vocabulary_fingerprint
from parallel.comm.world import World
from parallel.layout import Layout
from train.checkpoint.index import read_progress
from train.config import TrainConfig, check_placeholder, check_tiles, check_vocabulary, phases
from train.online_filter import candidates
from train.run_directory import RunDirectory, committed

IMAGES = "images.json"


def get_corpus(
    config: TrainConfig, world: World, report: Callable[[str], None], models: Models | None = None
) -> Corpus:
    """Make the corpus on rank 0 or find it in the cache, and open it on all ranks, which together verify its hashes.

    `models` opens the models with which a filter scores. If it is None and the filter needs a model, the corpus must be
    in the cache.
    Raises `ConfigError` if the tokenizer has more ids than the model.
    """
    directory = world.from_main(lambda: prepare(config.data, report, models).directory)
    return _verified(open_corpus(directory), config, world)


def _verified(corpus: Corpus, config: TrainConfig, world: World) -> Corpus:
    if config.data.verify:
        corpus.verify(world.rank, world.size)
    check_vocabulary(corpus.tokenizer.vocab_size, config.model)
    if corpus.images is not None:
        check_tiles(corpus.images.tiles, config.model)
        check_placeholder(corpus.images.ids.patch, config.model)
    return corpus


def stored_corpus(
    directory: Path, config: TrainConfig, world: World, report: Callable[[str], None], models: Models | None = None
) -> Corpus:
    """Open the corpus of a stored run: from the cache, whether or not its sources still exist, else from its sources.
    The configuration is untrusted, so import paths in it are not imported: with some, the corpus must be in the cache.
    Raises `ConfigError` if it is not there.
    """
    if config.data.tokens is not None:
        return get_corpus(config, world, report, models)

    def cached() -> Path | None:
        done = committed(RunDirectory(directory, config.checkpoint.directory).checkpoints)
        fingerprint = read_progress(done[-1].path).get("corpus", "") if done else ""
        corpus = find_corpus(Path(config.data.cache), fingerprint)
        return None if corpus is None else corpus.directory

    found = world.from_main(cached)  # else ranks with other disks would go other ways
    if found is None:
        for key, path in config.data.import_paths().items():
            reason = (
                f"the corpus of {directory} is not in {config.data.cache}, and import paths of a stored run are not "
                "imported: make it again by `leviathan tokenize` with the run's data settings"
            )
            raise ConfigError(f"data.{key}", path, reason)
        return get_corpus(config, world, report, models)
    return _verified(open_corpus(found), config, world)


def keep_tokenizer(corpus: Corpus, run: RunDirectory) -> None:
    """Copy the tokenizer, and how pictures become tiles and tokens, into the run's directory, so that the model can be
    used without its corpus.
    """
    if not run.tokenizer.exists():
        with new_directory(run.tokenizer) as scratch:
            corpus.tokenizer.save(scratch)
            if corpus.images is not None:
                write_json(scratch / IMAGES, asdict(corpus.images))


def run_images(run: Path) -> ImageDescription | None:
    """Read how a run's pictures become tiles and tokens; None for a run without pictures."""
    path = RunDirectory(run).tokenizer / IMAGES
    if not path.exists():
        return None
    try:
        return ImageDescription.read(read_json(path, ImageDescription.SHAPE))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): restore it") from None


def run_tokenizer(run: Path, progress: dict[str, Any], corpus: Callable[[], Corpus]) -> Tokenizer:
    """Load the tokenizer of a run. `corpus` opens the run's corpus, which has the tokenizer of an older version's run.

    Raises `DataError` if it is not the one that the checkpoint with this progress was trained with.
    """
    kept = RunDirectory(run).tokenizer
    if not kept.exists():
        return corpus().tokenizer
    tokenizer = load_tokenizer(kept)
    if vocabulary_fingerprint(tokenizer) != progress.get("vocabulary"):
        raise DataError(f"{kept} is not the tokenizer that the model was trained with: restore it")
    return tokenizer


def trained_corpus(
    run: Path, config: TrainConfig, world: World, progress: dict[str, Any], models: Models | None = None
) -> Corpus:
    """Open the corpus that a checkpoint with this progress was trained on. Raises `ConfigError` if it has changed."""
    corpus = stored_corpus(run, config, world, lambda line: None, models)
    check_same_data(progress, corpus)
    return corpus


def check_same_data(progress: dict[str, Any], corpus: Corpus) -> None:
    """Raise `ConfigError` unless the checkpoint was trained on this corpus."""
    then = str(progress.get("corpus"))
    if then != corpus.fingerprint:
        reason = (
            f"the corpus is not the one this run was trained on (now {corpus.fingerprint[:12]}, "
            f"then {then[:12]}); restore the data; to train on other data, name a new run"
        )
        raise ConfigError("data", None, reason)


def source_weights(config: TrainConfig, corpus: Corpus) -> dict[str, float]:
    """Return the weight of each source of the corpus: that of the configuration, or 1 for a source it does not name."""
    return {name: config.data.sources[name].weight if name in config.data.sources else 1.0 for name in corpus.sources}


def with_image_tokens(layout: Layout, config: TrainConfig, corpus: Corpus) -> Layout:
    """Return the layout with the share of image tokens in the training data, unless the configuration names one."""
    if layout.vision.image_token_share is not None or corpus.images is None:
        return layout
    weights = phases(config)[0].weights or source_weights(config, corpus)
    share = sum(weight * corpus.image_tokens(name) for name, weight in weights.items()) / sum(weights.values())
    return replace(layout, vision=replace(layout.vision, image_token_share=share))


def run_loaders(config: TrainConfig, corpus: Corpus, report: Callable[[str], None]) -> dict[str, Loader]:
    """Make a loader for each phase of a run. Raises `ConfigError` if a source runs out before the end."""
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
