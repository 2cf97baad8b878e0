"""The features, weights and targets of the learned scorer are those by hand, and random labels have the AUC of chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.filter.audit.separation import auc
from data.filter.input.records import Record
from data.filter.score import linear
from data.filter.score.features import FIGURES, TEXT_BYTES, features_of
from tests.data.filter.score.test_learned import problems


def test_features_tell_words_apart_and_ignore_the_batch():
    texts = [
        "The cat sat.",
        "the CAT sat.",
        "the dog sat.",
        "x = 12",
        "x = 34",
        "x = 5",
        "",
        "你好",
        "好你",
        "a b",
        "ab",
        "b a",
    ]
    whole = features_of(texts)

    def row(number: int) -> list[tuple[int, float]]:
        mine = whole.rows_T == number
        return list(zip(whole.columns_T[mine].tolist(), whole.counts_T[mine].tolist(), strict=True))

    for number, text in enumerate(texts):
        alone = features_of([text])
        assert row(number) == list(zip(alone.columns_T.tolist(), alone.counts_T.tolist(), strict=True))
        assert (whole.figures_NF[number] == alone.figures_NF[0]).all()
    assert row(0) == row(1) != row(2) and row(3) == row(4) != row(5) and row(6) == [] and row(9) != row(10)
    assert row(9) != row(11), "the order of words counts"
    assert len(row(7)) == 3 and {c for c, _ in row(7)} & {c for c, _ in row(8)}, "two characters and their pair"


def test_vectors_are_those_by_hand():
    """Prompt and answer have columns and a length of their own; counts are damped, and figures are cut."""
    record = Record("1", "all", "s", "one one two\nthree", 12)
    weighting = replace(linear.Weighting.fitted([[record]]), idf_C=np.ones(linear.COLUMNS, np.float32))
    found = weighting.vectors([record])
    assert not weighting.familiar_C.any(), "n-grams of one record are not familiar"
    is_answer = found.columns_T >= linear.COLUMNS // 2
    assert found.values_T[is_answer].tolist() == [1]
    damped = np.array([1, 1, 1, 1 + np.log(2)])  # two, one one, one two; one
    assert np.allclose(np.sort(found.values_T[~is_answer]), damped / np.linalg.norm(damped))
    [figures] = weighting.vectors([replace(record, text="9" * 5000 + "\n", answer_start=5000)]).figures_NK
    count = len(figures) // 2
    assert abs(figures[:count]).max() * np.sqrt(count) == pytest.approx(np.sqrt(linear._LINEAR) * linear._LIMIT)


def test_figures_are_those_by_hand():
    [found] = features_of(["Ab cd 12 7\n(c+d)."]).figures_NF
    logs = {"bytes": 17, "words": 10, "lines": 1, "sentences": 1, "numbers": 2}
    wanted = {f"log {name}": np.log1p(count) for name, count in logs.items()}
    shares = {"digits": 3, "capitals": 1, "operators": 1, "brackets": 2, "backslashes": 0, "spaces": 4}
    wanted |= {name: count / 17 for name, count in shares.items()}
    wanted |= {"length of words": 6 / 4, "distinct words": 19 / 20, "longest number": 2}
    assert dict(zip(FIGURES, found.tolist(), strict=True)) == pytest.approx(wanted)
    whole, cut = features_of(["word " * 20_000]), features_of(["word " * (TEXT_BYTES // 5) + "w"])
    assert whole.counts_T.tolist() == cut.counts_T.tolist(), "only the beginning of a long text is read"


def test_targets_are_ranks_less_the_mean_of_their_domain():
    """Where a domain has few labels, its mean counts less."""
    labels, domains = np.r_[np.arange(100.0), np.arange(100.0) + 500, 7000], np.r_[np.repeat([0, 1], 100), 2]
    targets = linear._targets(labels, domains)
    assert abs(targets[:100].mean()) < 0.01 > abs(targets[100:200].mean())
    assert np.allclose(np.diff(targets[:100]), 1 / 201) and 0.3 < targets[200] < 0.4
    tied = linear._targets(np.array([1.0, 2, 2, 2, 3]), np.zeros(5, np.int64))
    assert tied[1] == tied[2] == tied[3] and tied[0] < tied[1] < tied[4]


def test_the_penalty_is_chosen_by_what_the_labels_teach():
    """Labels in random order are hardly fitted. Control: the weakest penalty fits them."""
    records = problems(4, 120)
    vectors, targets = linear.Weighting.fitted([records]).vectors(records), np.random.default_rng(0).normal(size=120)

    def fit() -> float:
        weights, of_figures = linear._ridge(vectors.matrix, vectors.figures_NK, targets)
        return float((vectors.matrix @ weights + vectors.figures_NK @ of_figures).std() / targets.std())

    assert fit() < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_PENALTIES", linear._PENALTIES[:1])
        assert fit() > 0.9


def test_random_labels_have_the_auc_of_chance():
    """Ten kinds of texts, of which one has nearly equal texts. Control: pairs of different folds are biased: 0.33."""
    texts = [f"{'abcdefghij'[kind] * 5} {'klmnopqrst'[kind] * 4} {n:05}" for kind in range(10) for n in range(20)]
    records, kinds = [Record(text, "all", "s", text, 0) for text in texts], np.repeat(np.arange(10), 20)
    weighting, found = linear.Weighting.fitted([records]), []
    for draw in range(12):
        labels = np.random.default_rng(draw).integers(0, 2, len(records)).astype(float)
        scores, folds = linear.learn(weighting, records, labels, records).score(records)
        found.append([auc({"": scores}, labels, kinds, 0, folds=some)[""].value for some in (folds, None)])
    inside, pooled = np.mean(found, axis=0)
    assert abs(inside - 0.5) < 0.06 and pooled < 0.4, "three standard errors"
