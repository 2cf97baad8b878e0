"""Build a scorer from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError
from core.import_path import construct
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.scorer import Direction, Scorer, TokenLosses

OpenLosses = Callable[[str, ScorerConfig], tuple[TokenLosses, str]]
"""Opens a model by name. Returns its token losses and the fingerprint of its weights and tokenizer; `seq_len` and
`batch_size` are the configuration's.
"""


@dataclass(frozen=True)
class Models:
    """Access to models, passed in because `data` does not import them. `check_unseen` raises `ConfigError` where the
    named model was trained on these records, or returns a warning.
    """

    open: OpenLosses
    check_unseen: Callable[[str, Iterable[Record]], str | None]


_WITH_WINDOW = (ScorerKind.ngram, ScorerKind.loss, ScorerKind.excess, ScorerKind.ensemble)


def make_scorer(config: ScorerConfig, models: Models | None, cache: Path, seed: int = 0) -> Scorer:
    """Return the scorer of `config.kind`. `models` opens models (None: kinds that need one are rejected), `cache` holds
    the answers of endpoints, `seed` is for the random scorer. Raises `ConfigError` with the key below `scorer`.

    Imports are local: an n-gram scorer must not wait for an HTTP client.
    """
    if isinstance(config.kind, str):
        return _imported(config, config.kind)
    if config.window is not None and config.kind not in _WITH_WINDOW:
        raise ConfigError("window", config.window, f"has no effect on {config.kind.name}", ["null"])
    match config.kind:
        case ScorerKind.loss | ScorerKind.excess | ScorerKind.ifd:
            return _from_models(config, models)
        case ScorerKind.judge:
            from data.filter.score.judge import JudgeScorer

            return JudgeScorer(config, cache)
        case ScorerKind.pass_rate:
            from data.filter.score.pass_rate import PassRateScorer

            return PassRateScorer(config, cache)
        case ScorerKind.ensemble:
            from data.filter.score.ensemble import EnsembleScorer

            return EnsembleScorer(_members(config, models, cache, seed))
        case ScorerKind.ngram:
            from data.filter.score.ngram import NgramScorer

            return NgramScorer(config.order, config.window)
        case ScorerKind.random | ScorerKind.length:
            from data.filter.score.baselines import LengthScorer, RandomScorer

            return RandomScorer(seed) if config.kind is ScorerKind.random else LengthScorer()


def _imported(config: ScorerConfig, path: str) -> Scorer:
    needs = ("name", "measures", "direction", "fingerprint", "fit", "score")
    scorer: Scorer = construct(path, "kind", options=config.options, needs=needs)
    if not isinstance(scorer.direction, Direction):
        raise ConfigError("kind", path, "direction must be a data.filter.score.scorer.Direction")
    return scorer


def _from_models(config: ScorerConfig, models: Models | None) -> Scorer:
    from data.filter.score.losses import DifficultyOfFollowing, ExcessScorer, LossScorer

    if models is None:
        raise ConfigError("kind", config.kind, "needs a model, and models cannot be opened here", ["ngram"])
    model = _opened("model", config.model, config, models)
    if config.kind is ScorerKind.loss:
        return LossScorer(*model, config.window)
    if config.kind is ScorerKind.ifd:
        return DifficultyOfFollowing(*model)
    return ExcessScorer(*model, *_opened("reference", config.reference, config, models), config.window)


def _opened(key: str, name: str | None, config: ScorerConfig, models: Models) -> tuple[TokenLosses, str]:
    assert name is not None  # ScorerConfig checks it
    try:
        return models.open(name, config)
    except ConfigError as error:
        raise error.under(key) from None


def _members(config: ScorerConfig, models: Models | None, cache: Path, seed: int) -> list[Scorer]:
    found = []
    for place, member in enumerate(config.members):
        try:
            found.append(make_scorer(member, models, cache, seed))
        except ConfigError as error:
            raise error.under(f"members[{place}]") from None
    return found


def models_of(config: ScorerConfig, key: str = "scorer") -> Iterator[tuple[str, str]]:
    """Yield the configuration key and the name of every model that the scorer uses."""
    for name in ("model", "reference"):
        if (model := getattr(config, name)) is not None:
            yield f"{key}.{name}", model
    for place, member in enumerate(config.members):
        yield from models_of(member, f"{key}.members[{place}]")
