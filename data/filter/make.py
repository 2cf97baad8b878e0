"""From a scorer's configuration to the scorer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from core.errors import ConfigError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.scorer import Scorer, TokenLosses

OpenLosses = Callable[[str, ScorerConfig], tuple[TokenLosses, str]]
"""A model by its name, as token losses, and the fingerprint of its weights and tokenizer; `context` and `batch` are the
configuration's.
"""
_WITH_WINDOW = (ScorerKind.ngram, ScorerKind.loss, ScorerKind.excess, ScorerKind.ensemble)


def make_scorer(config: ScorerConfig, losses: OpenLosses | None, cache: Path, seed: int = 0) -> Scorer:
    """The scorer of any kind. `losses` opens the models (None: kinds that need one are refused); `cache` is where
    answers of endpoints are kept; `seed` is of lots. Raises `ConfigError` with the key, below `scorer`.

    Each kind's module is imported only here: an n-gram scorer must not wait for an HTTP client.
    """
    if config.window is not None and config.kind not in _WITH_WINDOW:
        raise ConfigError("window", config.window, f"means nothing to {config.kind.name}", ["null"])
    if config.kind in (ScorerKind.loss, ScorerKind.excess, ScorerKind.ifd):
        return _from_models(config, losses)
    if config.kind is ScorerKind.judge:
        from data.filter.judge import JudgeScorer

        return JudgeScorer(config, cache)
    if config.kind is ScorerKind.pass_rate:
        from data.filter.pass_rate import PassRateScorer

        return PassRateScorer(config, cache)
    if config.kind is ScorerKind.ensemble:
        from data.filter.ensemble import EnsembleScorer

        return EnsembleScorer(_members(config, losses, cache, seed))
    if config.kind is ScorerKind.ngram:
        from data.filter.ngram import NgramScorer

        return NgramScorer(config.order, config.window)
    from data.filter.controls import LengthScorer, RandomScorer

    return RandomScorer(seed) if config.kind is ScorerKind.random else LengthScorer()


def _from_models(config: ScorerConfig, losses: OpenLosses | None) -> Scorer:
    from data.filter.losses import DifficultyOfFollowing, ExcessScorer, LossScorer

    if losses is None:
        raise ConfigError("kind", config.kind, "needs a model, and none can be opened here", ["ngram"])
    model = _opened("model", config.model, config, losses)
    if config.kind is ScorerKind.loss:
        return LossScorer(*model, config.window)
    if config.kind is ScorerKind.ifd:
        return DifficultyOfFollowing(*model)
    return ExcessScorer(*model, *_opened("reference", config.reference, config, losses), config.window)


def _opened(key: str, name: str | None, config: ScorerConfig, losses: OpenLosses) -> tuple[TokenLosses, str]:
    assert name is not None  # ScorerConfig sees to it
    try:
        return losses(name, config)
    except ConfigError as error:
        raise error.under(key) from None


def _members(config: ScorerConfig, losses: OpenLosses | None, cache: Path, seed: int) -> list[Scorer]:
    found = []
    for place, member in enumerate(config.members):
        try:
            found.append(make_scorer(member, losses, cache, seed))
        except ConfigError as error:
            raise error.under(f"members[{place}]") from None
    return found
