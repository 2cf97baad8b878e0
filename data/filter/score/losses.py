"""Scorers that ask language models how surprising a record's answer is; `TokenLosses` is all that they know of one.

The loss is that of the answer given its prompt; a plain document is all answer. None of them learns from the records:
that a model was not trained on what it scores is its owner's business (`train/eval/contamination.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from core.files import sha256_text
from data.filter.input.records import Record
from data.filter.score.scorer import Direction, TokenLosses


class _Fixed:
    """A scorer whose models are given: there is nothing to fit."""

    def fit(self, records: Callable[[], Iterable[Record]]) -> None:
        return


class LossScorer(_Fixed):
    """Mean loss of a reference model, in nats per token (perplexity pruning, Ankner et al. 2024, arXiv 2405.20541), or
    the mean over the hardest `window` tokens in a row: one hard step in a long easy text counts. NaN without tokens.

    `fingerprint` is the model's: a hash of its weights and its tokenizer.
    """

    name = "loss"
    direction = Direction.hard

    def __init__(self, losses: TokenLosses, fingerprint: str, window: int | None = None) -> None:
        self.losses, self.window = losses, window
        part = "all" if window is None else f"the hardest {window} in a row"
        self.measures = f"loss of the answer, nats per token, mean of {part}"
        self.fingerprint = sha256_text("loss", fingerprint, str(window))

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        found = self.losses([(record.prompt, record.answer) for record in records])
        return np.array([hardest(one, self.window) for one in found], np.float64)


class ExcessScorer(_Fixed):
    """Loss of a model less that of a better one, `reference` (RHO-loss, Mindermann et al. 2022, arXiv 2206.07137): what
    is learnable and not yet learnt. Noise is as hard for both and scores near 0.

    In nats per byte of UTF-8, since two models may have two tokenizers. With `window` it is the mean difference per
    token over the `window` tokens in a row where it is largest; `ConfigError` where the two cut a text into tokens
    differently, for then there are no differences per token. NaN where there are no tokens.
    """

    name = "excess"
    direction = Direction.learnable

    def __init__(
        self,
        model: TokenLosses,
        model_fingerprint: str,
        reference: TokenLosses,
        reference_fingerprint: str,
        window: int | None = None,
    ) -> None:
        self.model, self.reference, self.window = model, reference, window
        part = "byte" if window is None else f"token, the {window} in a row where it is largest"
        self.measures = f"loss less the reference's, nats per {part}"
        self.fingerprint = sha256_text("excess", model_fingerprint, reference_fingerprint, str(window))

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        pairs = [(record.prompt, record.answer) for record in records]
        both = zip(records, self.model(pairs), self.reference(pairs), strict=True)
        return np.array([self._excess(record, mine, better) for record, mine, better in both], np.float64)

    def _excess(self, record: Record, mine: NDArray[np.float32], better: NDArray[np.float32]) -> float:
        if not len(mine) or not len(better):
            return np.nan
        if self.window is None:
            return float((mine.sum(dtype=np.float64) - better.sum(dtype=np.float64)) / len(record.answer.encode()))
        if len(mine) != len(better):
            reason = (
                f"needs two models with one tokenizer ({record.source} has {len(mine)} tokens for one and {len(better)}"
                " for the other); without a window they are compared per byte"
            )
            raise ConfigError("window", self.window, reason, ["null"])
        return hardest(mine.astype(np.float64) - better, self.window)


class DifficultyOfFollowing(_Fixed):
    """Instruction-following difficulty: mean loss of the answer given its prompt over its mean loss alone (IFD, Li et
    al. 2023, arXiv 2308.12032). Near 0 the prompt says it all; above 1 it does not help, which the paper takes for a
    mismatch of the two: look at such records before keeping them.

    NaN for plain documents and empty prompts, which give nothing to follow, and for answers without loss.
    """

    name = "ifd"
    measures = "loss of the answer given its prompt over its loss alone (a ratio; above 1 the prompt does not help)"
    direction = Direction.hard

    def __init__(self, losses: TokenLosses, fingerprint: str) -> None:
        self.losses = losses
        self.fingerprint = sha256_text("ifd", fingerprint)

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        scores = np.full(len(records), np.nan)
        places = [place for place, record in enumerate(records) if record.prompt.strip()]
        given = [(records[place].prompt, records[place].answer) for place in places]
        found = self.losses([*given, *(("", answer) for _, answer in given)])  # one call, to be batched together
        for place, with_prompt, alone in zip(places, found[: len(given)], found[len(given) :], strict=True):
            divisor = hardest(alone)
            if divisor > 0:  # not for NaN, which is what no tokens give
                scores[place] = hardest(with_prompt) / divisor
        return scores


def hardest(losses: NDArray[np.floating], window: int | None = None) -> float:
    """Mean of the `window` losses in a row whose mean is largest; of all where there are fewer, or no window. NaN of
    none.
    """
    if not len(losses):
        return np.nan
    if window is None or window >= len(losses):
        return float(losses.mean(dtype=np.float64))
    sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    return float((sums[window:] - sums[:-window]).max() / window)
