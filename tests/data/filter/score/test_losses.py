"""Compare scorers of token losses (here from a table) with arithmetic by hand, and test the scorer factory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from core.errors import ConfigError
from data.filter.config import ScorerConfig, ScorerKind
from data.filter.input.records import Record
from data.filter.score.factory import Models, make_scorer
from data.filter.score.losses import DifficultyOfFollowing, ExcessScorer, LossScorer
from data.filter.score.ngram import NgramScorer
from data.filter.score.scorer import Direction, Scorer, TokenLosses, hardest_mean


def record(text: str, prompt: str | None = None) -> Record:
    start = None if prompt is None else len(prompt)
    return Record(text, "d", "s", (prompt or "") + text, start)


def table(losses: dict[tuple[str, str], list[float]]) -> TokenLosses:
    def look_up(pairs: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        return [np.array(losses[pair], np.float32) for pair in pairs]

    return look_up


def test_mean_loss_is_of_the_answer_given_its_prompt():
    documents = {("", "plain"): [1, 2, 6], ("", ""): [], ("", "a"): [np.nan], ("", "b"): [np.inf]}
    losses = table(documents | {("Q", "A"): [4, 2]})
    found = LossScorer(losses, "f").score([record("plain"), record("A", "Q"), *map(record, ("", "a", "b"))])
    assert found[:2].tolist() == [3, 3] and not np.isfinite(found[2:]).any()


def test_a_window_notices_one_hard_step():
    easy, spiked = [1.0] * 12, [0.5] * 5 + [4.0, 4.0] + [0.5] * 9
    losses = table({("", "easy"): easy, ("", "spiked"): spiked})
    records = [record("easy"), record("spiked")]
    by_mean, by_window = LossScorer(losses, "f"), LossScorer(losses, "f", window=2)
    assert np.diff(by_mean.score(records))[0] < 0 < np.diff(by_window.score(records))[0]
    assert by_mean.fingerprint != by_window.fingerprint


@pytest.mark.parametrize("window", [1, 3, 7, 40, 41])
def test_hardest_mean_against_every_window(window):
    losses = np.random.default_rng(window).exponential(size=40).astype(np.float32)
    size = min(window, 40)
    slow = max(float(losses[i : i + size].astype(np.float64).mean()) for i in range(40 - size + 1))
    assert hardest_mean(losses, window) == pytest.approx(slow, rel=1e-12)
    integers = np.arange(40) * 7 % 11
    assert hardest_mean(integers, window) == max(integers[i : i + size].mean() for i in range(40 - size + 1))


def test_excess_is_per_byte_and_learnable():
    mine = table({("Q", "abcd"): [3, 3], ("", "öö"): [2, 2]})
    better = table({("Q", "abcd"): [1, 1, 1, 1], ("", "öö"): [2]})
    scorer = ExcessScorer(mine, "m", better, "b")
    assert scorer.score([record("abcd", "Q"), record("öö")]).tolist() == [0.5, 0.5]
    assert scorer.direction is Direction.learnable and LossScorer(mine, "m").direction is Direction.improbable
    assert scorer.fingerprint != ExcessScorer(better, "b", mine, "m").fingerprint, "the order of the two models matters"


def test_following_is_a_ratio_and_plain_documents_have_none():
    given = {("Q", "A"): [1, 3], ("Q", "B"): [6], ("Q", ""): [], ("Q", "C"): [0, 0]}
    alone = {("", "A"): [8], ("", "B"): [4], ("", ""): [], ("", "C"): [0, 0]}
    records = [record("A", "Q"), record("B", "Q"), record("doc"), record("A", " "), record("", "Q"), record("C", "Q")]
    found = DifficultyOfFollowing(table(given | alone), "f").score(records)
    assert found[:2].tolist() == [0.25, 1.5], "above 1 the prompt does not help"
    assert np.isnan(found[2:]).all(), "no prompt, no answer, or no loss without the prompt"


@pytest.mark.parametrize("kind", ScorerKind)
def test_the_factory_builds_every_kind(kind, tmp_path):
    opened = []

    def open_model(name: str, config: ScorerConfig) -> tuple[TokenLosses, str]:
        opened.append((name, config.seq_len))
        return table({}), name

    needed: dict[str, Any] = {
        "model": "m",
        "reference": "r",
        "url": "http://h",
        "judge": "j",
        "verifier": "operator:eq",
    }
    if kind is ScorerKind.learned:
        del needed["model"]  # which would be a stored scorer
    members = [ScorerConfig(ScorerKind.random), ScorerConfig()]
    config = ScorerConfig(kind, seq_len=7, members=members, **needed)
    scorer = make_scorer(config, Models(open_model, Mock(), Mock()), tmp_path)
    assert scorer.name == ("ngram" if kind is ScorerKind.auto else kind.name) and scorer.fingerprint
    assert opened == [(needed[key], 7) for key in kind.traits.needs if key in ("model", "reference")]
    assert (type(scorer).fit is not Scorer.fit) == kind.traits.reads_all_first
    for key in kind.traits.needs:
        with pytest.raises(ConfigError, match=f"{key}: the scorer {kind.name} needs it"):
            replace(config, **{key: None})
    if not kind.traits.takes_window:
        with pytest.raises(ConfigError, match=f"window=3: has no effect on {kind.name}"):
            make_scorer(replace(config, window=3), Models(open_model, Mock(), Mock()), tmp_path)


def test_the_factory_passes_settings_on(tmp_path):
    assert make_scorer(ScorerConfig(order=3, window=4), None, tmp_path).fingerprint == NgramScorer(3, 4).fingerprint
    member = ScorerConfig(ScorerKind.random)
    random = [make_scorer(member, None, tmp_path, seed).score([record("a")]) for seed in (1, 2)]
    assert random[0] != random[1]


def test_the_factory_rejects_impossible_settings(tmp_path):
    config = ScorerConfig(ScorerKind.loss, model="m")
    missing = Mock(side_effect=ConfigError("", "m", "no such run"))
    for models, message in ((Models(missing, Mock(), Mock()), "model=m: no such run"), (None, "needs a model")):
        with pytest.raises(ConfigError, match=message):
            make_scorer(config, models, tmp_path)
