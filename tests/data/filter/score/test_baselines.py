"""The control scorers (random and length) ignore difficulty. The ensemble averages ranks, not scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from core.errors import ConfigError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.baselines import LengthScorer, RandomScorer
from data.filter.score.ensemble import EnsembleScorer
from data.filter.score.scorer import Direction, Scorer
from tests.support.filtering import FixedScorer


def made(count: int) -> list[Record]:
    prompts = [f"prompt {n}: " for n in range(count)]
    return [Record(str(n), "t", f"made:{n}", one + "x" * n, len(one)) for n, one in enumerate(prompts)]


def scaled(scale: float, missing: Sequence[str] = ()) -> FixedScorer:
    """Score a record by `scale` times the length of its answer, and by NaN if its id is in `missing`."""
    return FixedScorer(lambda r: np.nan if r.id in missing else scale * len(r.answer), f"scaled {scale}")


def fitted(members: Sequence[Scorer], records: list[Record], sample: int = 4096) -> EnsembleScorer:
    scorer = EnsembleScorer(members, sample)
    scorer.fit(lambda: iter(records))
    return scorer


def test_random_scores_depend_on_text_and_seed_only():
    data = made(2000)
    scores = RandomScorer().score(data)
    assert scores.tolist() == RandomScorer().score(data[::-1])[::-1].tolist()
    assert scores.min() >= 0 and scores.max() < 1 and abs(scores.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(scores, RandomScorer(1).score(data))[0, 1]) < 0.1
    assert abs(np.corrcoef(scores, LengthScorer().score(data))[0, 1]) < 0.1


def test_length_is_of_the_answer_in_bytes():
    pair = Record("a", "t", "m", "a long prompt: é☃", answer_start=len("a long prompt: "))
    assert LengthScorer().score([pair, Record("b", "t", "m", "whole")]).tolist() == [5, 5]


def test_ranks_are_averaged_and_scales_do_not_matter():
    data = made(100)
    once = fitted([scaled(1), scaled(-1e6)], data).score(data)
    assert np.allclose(once, 0.5)
    ranks = fitted([scaled(1), scaled(1e9)], data).score(data)
    assert np.allclose(ranks, (np.arange(100) + 0.5) / 100)
    raw = np.mean([member.score(data) for member in (scaled(1), scaled(-1e6))], axis=0)
    assert not np.allclose(raw, raw[0]), "a mean of raw scores would follow the larger scale"


def test_a_rank_needs_no_other_record_and_members_are_fitted():
    data = made(300)
    members, fits = [scaled(1), scaled(2)], []
    for member in members:
        member.fit = fits.append  # type: ignore[method-assign]
    scorer = fitted(members, data, sample=50)
    assert len(fits) == 2
    assert scorer.score(data).tolist() == [scorer.score([record])[0] for record in data]
    assert fitted(members, data[::-1], sample=50).score(data).tolist() == scorer.score(data).tolist()
    assert np.abs(scorer.score(data) - np.arange(300) / 300).max() < 0.2  # 95% Kolmogorov bound: 1.36 / sqrt(50)


def test_a_missing_member_score_is_a_missing_score():
    data = made(20)
    scores = fitted([scaled(1), scaled(1, missing=["3"])], data).score(data)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [3]
    assert np.isnan(fitted([scaled(1), scaled(1)], []).score(data)).all()


def test_ties_share_their_rank():
    same = [Record(str(n), "t", "m", f"{n}:abc", 2) for n in range(9)]
    assert np.allclose(fitted([LengthScorer(), scaled(1)], same).score(same), 0.5)


def test_ensemble_errors_and_properties():
    with pytest.raises(ConfigError, match="members"):
        ScorerConfig(ScorerKind.ensemble, members=[ScorerConfig()])
    with pytest.raises(ValueError, match="fit"):
        EnsembleScorer([LengthScorer(), RandomScorer()]).score(made(1))
    learnable = scaled(1)
    learnable.direction = Direction.learnable
    mixed = EnsembleScorer([LengthScorer(), learnable])
    assert mixed.direction is Direction.mixed
    assert EnsembleScorer([LengthScorer(), RandomScorer()]).fingerprint != mixed.fingerprint


def test_the_order_of_members_is_in_the_fingerprint():
    one, two = (FixedScorer(lambda record: 1.0, name) for name in "ab")
    assert EnsembleScorer([one, two]).fingerprint != EnsembleScorer([two, one]).fingerprint, "fixed[0] is another"
