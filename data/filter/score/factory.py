"""Build a scorer from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError
from core.import_path import construct
from data.filter.config import FeatureKind, ScorerConfig, ScorerKind, under
from data.filter.input.records import Record
from data.filter.score.features import ReferenceFeatures
from data.filter.score.scorer import Direction, Scorer, TextFeatures, TokenLosses

OpenLosses = Callable[[str, ScorerConfig], tuple[TokenLosses, str]]
"""Opens a model by name, with the configuration's `seq_len` and `batch_size`. Returns the function for its token losses
and the fingerprint of its weights and tokenizer.
"""
OpenFeatures = Callable[[str, ScorerConfig], tuple[TextFeatures, str]]
"""Opens a model by name. Returns the function for the features of texts, of the kind `features` of the configuration,
and a fingerprint of everything on which they depend.
"""


@dataclass(frozen=True)
class Models:
    """Access to models, passed in because `data` does not import them. `check_unseen` raises `ConfigError`
    if the named model was trained on these records, or may return a warning.
    """

    open: OpenLosses
    check_unseen: Callable[[str, Iterable[Record]], str | None]
    open_features: OpenFeatures


def make_scorer(config: ScorerConfig, models: Models | None, directory: Path, seed: int = 0) -> Scorer:
    """Return the scorer of `config.kind`. `models` opens models (None: kinds that need a model are rejected),
    `directory` is where a scorer stores what it learned, and `seed` is for the random scorer. The key of a
    `ConfigError` is relative to `scorer`.

    Classes are imported here, so that an n-gram scorer does not wait for the import of an HTTP client.
    """
    if isinstance(config.kind, str):
        return _imported(config, config.kind)
    traits = config.kind.traits
    if config.window is not None and not traits.takes_window:
        raise ConfigError("window", config.window, f"has no effect on {config.kind.name}", ["null"])
    arguments: Sequence[object]
    match config.kind:
        case ScorerKind.ngram | ScorerKind.auto:
            arguments = config.order, config.window
        case ScorerKind.loss:
            arguments = *_opened(traits.needs, config, models), config.window
        case ScorerKind.excess | ScorerKind.ifd:
            arguments = _opened(traits.needs, config, models)
        case ScorerKind.learned:
            graders = _made({"labeler": config.labeler}, models, directory, seed)
            arguments = config, directory, next(iter(graders), None), _reference(config, models)
        case ScorerKind.ensemble:
            members = {f"members[{place}]": one for place, one in enumerate(config.members)}
            arguments = [_made(members, models, directory, seed)]
        case ScorerKind.random:
            arguments = [seed]
        case ScorerKind.length:
            arguments = []
        case _:
            arguments = [config]
    scorer: Scorer = construct(f"data.filter.score.{traits.path}", "kind", *arguments)
    return scorer


def _imported(config: ScorerConfig, path: str) -> Scorer:
    needs = ("name", "measures", "direction", "fingerprint", "fit", "score")
    scorer: Scorer = construct(path, "kind", options=config.options, needs=needs)
    if not isinstance(scorer.direction, Direction):
        raise ConfigError("kind", path, "direction must be a data.filter.score.scorer.Direction")
    return scorer


def _opened(keys: Sequence[str], config: ScorerConfig, models: Models | None) -> list[object]:
    """Return the token losses and the fingerprint of each model, in one list."""
    found: list[object] = []
    opener = _available(models, config)
    for key in keys:
        with under(key):
            found += opener.open(getattr(config, key), config)
    return found


def _available(models: Models | None, config: ScorerConfig) -> Models:
    if models is None:
        raise ConfigError("kind", config.kind, "needs a model, and models cannot be opened here", ["ngram"])
    return models


def _reference(config: ScorerConfig, models: Models | None) -> ReferenceFeatures | None:
    """Return the features that the reference model of a learned scorer computes, or None: n-grams are enough."""
    if config.features is FeatureKind.ngrams or config.reference is None:
        return None
    models = _available(models, config)
    with under("reference"):
        return ReferenceFeatures(config.features, config.reference, *models.open_features(config.reference, config))


def _made(
    configs: Mapping[str, ScorerConfig | None], models: Models | None, directory: Path, seed: int
) -> list[Scorer]:
    """Make the scorers of which a scorer consists, given by configuration key."""
    found = []
    for key, config in configs.items():
        if config is not None:
            with under(key):
                found.append(make_scorer(config, models, directory, seed))
    return found


def check_models(
    models: Models, scorer: ScorerConfig, records: Callable[[], Iterable[Record]], report: Callable[[str], None]
) -> None:
    """Raise `ConfigError` if a model was trained on the records, since memorised text looks easy. Report warnings."""
    for part, one in scorer.parts("scorer"):
        names: tuple[str, ...] = ("model", "reference")
        if one.kind is ScorerKind.learned:  # its `model` is a stored scorer
            names = () if one.features is FeatureKind.ngrams else ("reference",)
        for key, name in ((f"{part}.{key}", getattr(one, key)) for key in names):
            if name is not None:
                with under(key):
                    warning = models.check_unseen(name, records())
                if warning is not None:
                    report(f"warning: {key}: {warning}")
