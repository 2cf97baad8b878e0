"""Compare the n-gram baselines with a plain implementation of their formulas."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data import ngram_baseline
from data.ngram_baseline import GRID, NgramBaseline

VOCAB = 23


def random_batch(seed: int, rows: int = 6, length: int = 50, vocab: int = VOCAB) -> Any:
    """Draw tokens from a Markov chain, so that bigrams matter. Some labels are ignored."""
    chance = np.random.default_rng(seed)
    tokens = np.zeros((rows, length + 1), np.int64)
    for t in range(length):
        others = chance.integers(0, vocab, rows)
        tokens[:, t + 1] = np.where(chance.random(rows) < 0.7, (tokens[:, t] * 5 + 3) % vocab, others)
    labels = tokens[:, 1:].copy()
    labels[chance.random(labels.shape) < 0.1] = -100
    return SimpleNamespace(tokens_BT=torch.from_numpy(tokens[:, :-1].copy()), labels_BT=torch.from_numpy(labels))


def fitted(batches: list[Any], vocab: int = VOCAB) -> NgramBaseline:
    baseline = NgramBaseline(vocab)
    for b in batches:
        baseline.add(b.tokens_BT, b.labels_BT)
    return baseline


def pairs(batches: list[Any]) -> list[tuple[int, int]]:
    both = (zip(b.tokens_BT.flatten().tolist(), b.labels_BT.flatten().tolist(), strict=True) for b in batches)
    return [(first, second) for batch in both for first, second in batch if second >= 0]


def plain(train: list[Any], held_out: dict[str, list[Any]], weights: dict[str, float], vocab: int) -> list[float]:
    """Compute the unigram and the bigram loss, pair by pair."""
    c2 = Counter(pairs(train))
    c1, first = Counter(b for _, b in c2.elements()), Counter(a for a, _ in c2.elements())

    def mean(loss: Any) -> float:
        found = {name: pairs(batches) for name, batches in held_out.items()}
        sums = (weights[name] * sum(loss(a, b) for a, b in both) / len(both) for name, both in found.items())
        return sum(sums) / sum(weights.values())

    def p(b: int, k: float) -> float:
        return (c1[b] + k) / (c1.total() + k * vocab)

    unigram, k1 = min((mean(lambda a, b, k=k: -math.log(p(b, k))), k) for k in GRID)
    return [unigram, min(mean(lambda a, b, k=k: -math.log((c2[a, b] + k * p(b, k1)) / (first[a] + k))) for k in GRID)]


@pytest.mark.parametrize("vocab", [VOCAB, 202_048])
def test_losses_follow_the_formulas(vocab, monkeypatch):
    monkeypatch.setattr(ngram_baseline, "_MERGE_EVERY", 500)  # so that counts are merged several times
    train = [random_batch(seed) for seed in range(8)]
    held_out = {"a": [random_batch(100), random_batch(101)], "b": [random_batch(102)]}
    weights = {"a": 0.7, "b": 2.1}
    found = fitted(train, vocab).evaluate(held_out, weights)
    losses = [found["unigram_loss"], found["bigram_loss"]]
    assert losses == pytest.approx(plain(train, held_out, weights, vocab), rel=1e-12)
    assert found["bigram_loss"] == min(found["bigram_grid"].values()) < found["unigram_loss"] - 0.5
    for name in ("unigram", "bigram"):
        assert list(found[f"{name}_grid"]) == [str(k) for k in GRID]
        assert found[f"{name}_grid"][str(found[f"{name}_constant"])] == found[f"{name}_loss"]


def test_narrow_integers_do_not_overflow():
    """A pair of Llama 4's token ids, coded as one integer, needs more than 32 bits."""
    vocab, tokens = 202_048, np.random.default_rng(0).integers(0, 202_048, (4, 500))
    found = []
    for dtype in (np.int64, np.int32, np.uint32):
        narrow = tokens.astype(dtype)
        b = SimpleNamespace(tokens_BT=narrow[:, :-1], labels_BT=narrow[:, 1:])
        found.append(fitted([b], vocab).evaluate({"x": [b]}, {"x": 1.0}))
    assert found[0] == found[1] == found[2]
