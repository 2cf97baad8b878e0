"""Scorers over token losses that a table gives, against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.baselines import LengthScorer, RandomScorer
from data.filter.score.ensemble import EnsembleScorer
from data.filter.score.factory import Models, make_scorer
from data.filter.score.losses import DifficultyOfFollowing, ExcessScorer, LossScorer, hardest
from data.filter.score.ngram import NgramScorer
from data.filter.score.scorer import Direction, TokenLosses


def record(text: str, prompt: str | None = None) -> Record:
    start = None if prompt is None else len(prompt)
    return Record(text, "d", "s", (prompt or "") + text, start)


def nothing(name: str, records: object) -> None:
    """No model here has learnt anything."""


def table(losses: dict[tuple[str, str], list[float]]) -> TokenLosses:
    def look_up(pairs: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        return [np.array(losses[pair], np.float32) for pair in pairs]

    return look_up


def test_mean_loss_is_of_the_answer_given_its_prompt():
    losses = table({("", "plain"): [1, 2, 6], ("Q", "A"): [4, 2], ("", ""): []})
    found = LossScorer(losses, "f").score([record("plain"), record("A", "Q"), record("")])
    assert found[:2].tolist() == [3, 3] and np.isnan(found[2])


def test_the_hardest_window_sees_one_hard_step_that_the_mean_does_not():
    easy, spiked = [1.0] * 12, [0.5] * 5 + [4.0, 4.0] + [0.5] * 9
    losses = table({("", "easy"): easy, ("", "spiked"): spiked})
    records = [record("easy"), record("spiked")]
    by_mean, by_window = LossScorer(losses, "f"), LossScorer(losses, "f", window=2)
    assert np.diff(by_mean.score(records))[0] < 0 < np.diff(by_window.score(records))[0]
    assert by_mean.fingerprint != by_window.fingerprint


@pytest.mark.parametrize("window", [1, 3, 7, 40, 41])
def test_hardest_against_every_window_by_hand(window):
    losses = np.random.default_rng(window).exponential(size=40).astype(np.float32)
    size = min(window, 40)
    slow = max(float(losses[i : i + size].astype(np.float64).mean()) for i in range(40 - size + 1))
    assert hardest(losses, window) == pytest.approx(slow, rel=1e-12)


def test_a_loss_that_is_no_number_gives_none():
    losses = table({("", "a"): [1, np.nan, 2], ("", "b"): [1, np.inf]})
    assert not np.isfinite(LossScorer(losses, "f").score([record("a"), record("b")])).any()


def test_excess_is_per_byte_whatever_the_tokenizers_and_says_that_it_is_learnable():
    mine = table({("", "abcd"): [3, 3], ("", "öö"): [2, 2]})
    better = table({("", "abcd"): [1, 1, 1, 1], ("", "öö"): [2]})
    scorer = ExcessScorer(mine, "m", better, "b")
    assert scorer.score([record("abcd"), record("öö")]).tolist() == [0.5, 0.5]
    assert scorer.direction is Direction.learnable and LossScorer(mine, "m").direction is Direction.hard
    assert scorer.fingerprint != ExcessScorer(better, "b", mine, "m").fingerprint, "which is subtracted matters"


def test_noise_is_hard_but_has_no_excess():
    mine, better = (
        table({("", "noise"): [9, 9], ("", "new"): [5, 5]}),
        table({("", "noise"): [9, 9], ("", "new"): [1, 1]}),
    )
    records = [record("noise"), record("new")]
    noise, new = ExcessScorer(mine, "m", better, "b").score(records)
    assert noise == 0 < new
    assert np.diff(LossScorer(mine, "m").score(records))[0] < 0


def test_an_excess_window_needs_one_tokenizer():
    mine, same, other = (table({("", "x"): row}) for row in ([1, 5, 5], [1, 1, 2], [1, 1]))
    assert ExcessScorer(mine, "m", same, "s", window=2).score([record("x")]).tolist() == [3.5]
    with pytest.raises(ConfigError, match=r"one tokenizer .*3 tokens for one and 2"):
        ExcessScorer(mine, "m", other, "o", window=2).score([record("x")])


def test_following_is_a_ratio_and_plain_documents_have_none():
    losses = table({("Q", "A"): [1, 3], ("", "A"): [8], ("Q", "B"): [6], ("", "B"): [4], ("Q", ""): [], ("", ""): []})
    records = [record("A", "Q"), record("doc"), record("B", "Q"), record("A", " "), record("", "Q")]
    found = DifficultyOfFollowing(losses, "f").score(records)
    assert found[[0, 2]].tolist() == [0.25, 1.5], "above 1 the prompt does not help"
    assert np.isnan(found[[1, 3, 4]]).all()


def test_an_answer_without_loss_has_no_ratio():
    losses = table({("Q", "A"): [0, 0], ("", "A"): [0, 0], ("Q", "B"): [1], ("", "B"): [2]})
    found = DifficultyOfFollowing(losses, "f").score([record("A", "Q"), record("B", "Q")])
    assert np.isnan(found[0]) and found[1] == 0.5


def test_make_builds_each_and_passes_the_member_s_own_settings(tmp_path: Path):
    asked = []

    def opened(name: str, config: ScorerConfig) -> tuple[TokenLosses, str]:
        asked.append((name, config.seq_len))
        return table({}), name

    for kind, of in (
        (ScorerKind.loss, LossScorer),
        (ScorerKind.excess, ExcessScorer),
        (ScorerKind.ifd, DifficultyOfFollowing),
    ):
        scorer = make_scorer(ScorerConfig(kind, model="m", reference="r", seq_len=7), Models(opened, nothing), tmp_path)
        assert isinstance(scorer, of)
    assert asked == [("m", 7), ("m", 7), ("r", 7), ("m", 7)]


def test_make_refuses_what_cannot_be(tmp_path: Path):
    def missing(name: str, config: ScorerConfig) -> tuple[TokenLosses, str]:
        raise ConfigError("", name, "no such run")

    with pytest.raises(ConfigError, match="model=m: no such run"):
        make_scorer(ScorerConfig(ScorerKind.loss, model="m"), Models(missing, nothing), tmp_path)
    with pytest.raises(ConfigError, match="needs a model"):
        make_scorer(ScorerConfig(ScorerKind.loss, model="m"), None, tmp_path)
    with pytest.raises(ConfigError, match="window=3: means nothing to ifd"):
        make_scorer(ScorerConfig(ScorerKind.ifd, model="m", window=3), Models(missing, nothing), tmp_path)


def test_every_other_kind_is_made(tmp_path: Path):
    member = ScorerConfig(ScorerKind.random)
    for config, of in (
        (ScorerConfig(window=4, order=3), NgramScorer),
        (ScorerConfig(ScorerKind.random), RandomScorer),
        (ScorerConfig(ScorerKind.length), LengthScorer),
        (ScorerConfig(ScorerKind.ensemble, members=[member, ScorerConfig()]), EnsembleScorer),
    ):
        scorer = make_scorer(config, None, tmp_path, seed=1)
        assert isinstance(scorer, of) and scorer.fingerprint
    lots = [make_scorer(member, None, tmp_path, seed).score([record("a")]) for seed in (1, 2)]
    assert lots[0] != lots[1], "the seed is of lots"
