"""The n-gram baselines against a plain statement of their formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data import ngram_baseline
from data.ngram_baseline import GRID, NgramBaseline

VOCAB = 23


def batch(tokens: Any, labels: Any) -> Any:
    return SimpleNamespace(tokens_BT=tokens, labels_BT=labels)


def random_batch(seed: int, rows: int = 6, length: int = 50, vocab: int = VOCAB) -> Any:
    """A Markov chain, so that pairs matter; some labels are ignored."""
    chance = np.random.default_rng(seed)
    tokens = np.zeros((rows, length + 1), np.int64)
    for t in range(length):
        tokens[:, t + 1] = np.where(
            chance.random(rows) < 0.7, (tokens[:, t] * 5 + 3) % vocab, chance.integers(0, vocab, rows)
        )
    labels = tokens[:, 1:].copy()
    labels[chance.random(labels.shape) < 0.1] = -100
    return batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(labels))


def fitted(batches: list[Any], vocab: int = VOCAB) -> NgramBaseline:
    baseline = NgramBaseline(vocab)
    for b in batches:
        baseline.add(b.tokens_BT, b.labels_BT)
    return baseline


def pairs(batches: list[Any]) -> list[tuple[int, int]]:
    found = []
    for b in batches:
        both = zip(b.tokens_BT.flatten().tolist(), b.labels_BT.flatten().tolist(), strict=True)
        found += [(first, second) for first, second in both if second >= 0]
    return found


def plain(
    train: list[Any], held_out: dict[str, list[Any]], weights: dict[str, float], vocab: int
) -> tuple[float, float]:
    """Both losses in dictionaries and loops."""
    c1: dict[int, int] = {}
    c2: dict[tuple[int, int], int] = {}
    first: dict[int, int] = {}
    for a, b in pairs(train):
        c1[b], c2[a, b], first[a] = c1.get(b, 0) + 1, c2.get((a, b), 0) + 1, first.get(a, 0) + 1
    n, total = sum(c1.values()), sum(weights.values())

    def mean(loss: Any) -> float:
        found = {name: pairs(batches) for name, batches in held_out.items()}
        return sum(weights[name] / total * sum(loss(a, b) for a, b in ab) / len(ab) for name, ab in found.items())

    def p(b: int, k: float) -> float:
        return (c1.get(b, 0) + k) / (n + k * vocab)

    unigram, k1 = min((mean(lambda a, b, k=k: -math.log(p(b, k))), k) for k in GRID)
    bigram = min(
        mean(lambda a, b, k=k: -math.log((c2.get((a, b), 0) + k * p(b, k1)) / (first.get(a, 0) + k))) for k in GRID
    )
    return unigram, bigram


@pytest.mark.parametrize("vocab", [VOCAB, 202_048])
def test_losses_follow_the_formulas(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_baseline, "_MERGE_EVERY", 500)  # several merges
    train = [random_batch(seed) for seed in range(8)]
    held_out = {"a": [random_batch(100), random_batch(101)], "b": [random_batch(102)]}
    weights = {"a": 0.7, "b": 2.1}
    found = fitted(train, vocab).evaluate(held_out, weights)
    unigram, bigram = plain(train, held_out, weights, vocab)
    assert found["unigram_loss"] == pytest.approx(unigram, rel=1e-12)
    assert found["bigram_loss"] == pytest.approx(bigram, rel=1e-12)
    assert found["bigram_loss"] == min(found["bigram_grid"].values()) < found["unigram_loss"] - 0.5
    assert set(found["bigram_grid"]) == set(found["unigram_grid"]) == {str(k) for k in GRID}


def test_counting_in_parts_is_counting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = [random_batch(seed) for seed in range(6)], {"x": [random_batch(9)]}
    found = []
    for merge_every in (1 << 22, 700, 0):
        monkeypatch.setattr(ngram_baseline, "_MERGE_EVERY", merge_every)
        baseline = fitted(train)
        found.append(baseline.evaluate(held_out, {"x": 1.0}))
    assert found[0] == found[1] == found[2]
    baseline.add(train[0].tokens_BT, train[0].labels_BT)
    assert baseline.evaluate(held_out, {"x": 1.0}) != found[0]


def test_probabilities_add_up_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_baseline, "GRID", (0.3,))
    baseline = fitted([random_batch(1)])
    threes = np.full((1, 1), 3)
    found = [baseline.evaluate({"x": [batch(threes, np.full((1, 1), label))]}, {"x": 1.0}) for label in range(VOCAB)]
    for name in ("unigram_loss", "bigram_loss"):
        assert sum(math.exp(-losses[name]) for losses in found) == pytest.approx(1, abs=1e-12)


def test_narrow_integers_do_not_overflow() -> None:
    """Pair codes of Llama 4's vocabulary need more than 32 bits."""
    vocab, tokens = 202_048, np.random.default_rng(0).integers(0, 202_048, (4, 500))
    found = []
    for dtype in (np.int64, np.int32, np.uint32):
        narrow = tokens.astype(dtype)
        b = batch(narrow[:, :-1], narrow[:, 1:])
        found.append(fitted([b], vocab).evaluate({"x": [b]}, {"x": 1.0}))
    assert found[0] == found[1] == found[2]


def test_ignored_labels_do_not_count() -> None:
    b, held_out = random_batch(1), {"x": [random_batch(2)]}
    usual, counted = fitted([b]).evaluate(held_out, {"x": 1.0}), b.labels_BT >= 0
    without = fitted([batch(b.tokens_BT[counted], b.labels_BT[counted])])
    assert usual == without.evaluate(held_out, {"x": 1.0})
    b.labels_BT.clamp_(min=0)  # what counting them would do
    without.add(b.tokens_BT, b.labels_BT)
    assert usual != without.evaluate(held_out, {"x": 1.0})


def test_text_without_order_gives_the_bigram_no_advantage() -> None:
    chance = np.random.default_rng(0)
    train, test = chance.integers(0, VOCAB, (2, 1, 40_000))
    found = fitted([batch(train[:, :-1], train[:, 1:])]).evaluate({"x": [batch(test[:, :-1], test[:, 1:])]}, {"x": 1.0})
    assert found["unigram_loss"] == pytest.approx(math.log(VOCAB), abs=0.01)
    assert found["bigram_loss"] > found["unigram_loss"] - 0.001 and found["bigram_constant"] == GRID[-1]
