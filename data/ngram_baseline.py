"""Fit unigram and bigram models to the tokens that a run consumed: baselines for any language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.loader import Batch

GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_MERGE_EVERY = 1 << 22


class NgramBaseline:
    """Count labels and (token, label) pairs, except ignored (negative) labels. Pairs are stored as sorted codes, not in
    a table, so the vocabulary may be of any size.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._codes = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[NDArray[np.int64]] = []

    def add(self, tokens_BT: Any, labels_BT: Any) -> None:
        self._pending.append(self._encode(tokens_BT, labels_BT))
        if sum(map(len, self._pending)) > _MERGE_EVERY:
            self._merge()

    def evaluate(self, held_out: Mapping[str, Iterable[Batch]], weights: Mapping[str, float]) -> dict[str, Any]:
        """Return both models' losses for each k in `GRID`, and the best: nats per token, mean over sources by weight.

        With counts c of N labels from V ids, the unigram model is p(b) = (c(b) + k) / (N + kV). The bigram model is
        smoothed towards it: p(b | a) = (c(a, b) + k p(b)) / (c(a) + k).
        """
        self._merge()
        singles = np.bincount(self._codes % self.vocab_size, self._counts, self.vocab_size)
        firsts = np.bincount(self._codes // self.vocab_size, self._counts, self.vocab_size)
        codes = {
            name: np.concatenate([self._encode(b.tokens_BT, b.labels_BT) for b in bs]) for name, bs in held_out.items()
        }
        total = sum(weights[name] for name in codes)

        def mean(loss: Any) -> float:
            return float(sum(weights[name] * loss(found).mean() for name, found in codes.items()) / total)

        unigram = {k: mean(lambda c, k=k: -np.log(self._unigram(singles, k)[c % self.vocab_size])) for k in GRID}
        p = self._unigram(singles, min(unigram, key=unigram.__getitem__))
        bigram = {k: mean(lambda c, k=k: self._bigram(c, firsts, p, k)) for k in GRID}
        found: dict[str, Any] = {}
        for name, losses in (("unigram", unigram), ("bigram", bigram)):
            best = min(losses, key=losses.__getitem__)
            grid = {str(k): loss for k, loss in losses.items()}
            found |= {f"{name}_loss": losses[best], f"{name}_constant": best, f"{name}_grid": grid}
        return found

    def _unigram(self, singles: NDArray[Any], k: float) -> NDArray[np.float64]:
        return (singles + k) / (singles.sum() + k * self.vocab_size)

    def _bigram(self, codes: NDArray[np.int64], firsts: NDArray[Any], p: NDArray[Any], k: float) -> NDArray[np.float64]:
        place = np.searchsorted(self._codes, codes)
        place[place == len(self._codes)] = 0
        pairs = np.where(self._codes[place] == codes, self._counts[place], 0)
        return -np.log((pairs + k * p[codes % self.vocab_size]) / (firsts[codes // self.vocab_size] + k))

    def _encode(self, tokens_BT: Any, labels_BT: Any) -> NDArray[np.int64]:
        tokens, labels = np.asarray(tokens_BT), np.asarray(labels_BT)
        counted = labels >= 0
        return tokens[counted].astype(np.int64) * self.vocab_size + labels[counted].astype(np.int64)

    def _merge(self) -> None:
        if self._pending:
            codes, counts = np.unique(np.concatenate(self._pending), return_counts=True)
            self._codes, places = np.unique(np.concatenate([self._codes, codes]), return_inverse=True)
            self._counts = np.bincount(places, np.concatenate([self._counts, counts])).astype(np.int64)
            self._pending = []
