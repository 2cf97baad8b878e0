"""Score a record by the loss that language models have on its answer.

The loss is that of the answer given its prompt; the whole text of a plain document is its answer. These scorers do not
learn from the records. `train/eval/contamination.py` checks that the models were not trained on the records.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.files import sha256_text
from data.filter.input.records import Record
from data.filter.score.scorer import Direction, Scorer, TokenLosses, hardest_mean


class LossScorer(Scorer):
    """Score by the mean loss of a reference model in nats per token (perplexity pruning, Ankner et al. 2024, arXiv
    2405.20541), or by the mean over the hardest `window` consecutive tokens, which detects one hard step in a long easy
    text. NaN without tokens.

    `fingerprint`: a hash of the model's weights and tokenizer.
    """

    name = "loss"
    direction = Direction.improbable

    def __init__(self, losses: TokenLosses, fingerprint: str, window: int | None = None) -> None:
        self.losses, self.window = losses, window
        part = "all" if window is None else f"the hardest {window} in a row"
        self.measures = f"loss of the answer, nats per token, mean of {part}"
        self.fingerprint = sha256_text("loss", fingerprint, str(window))

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        losses = self.losses([(record.prompt, record.answer) for record in records])
        return np.array([hardest_mean(one, self.window) for one in losses], np.float64)


class ExcessScorer(Scorer):
    """Score by the loss of a model minus that of a better one, `reference` (RHO-loss, Mindermann et al. 2022, arXiv
    2206.07137). It is high for text that is learnable and not yet learnt. Noise is equally hard for both and scores
    near 0.

    The score is in nats per byte of UTF-8, because the models may have different tokenizers. NaN without tokens.
    """

    name = "excess"
    measures = "loss minus the reference's, nats per byte"
    direction = Direction.learnable

    def __init__(
        self,
        model: TokenLosses,
        model_fingerprint: str,
        reference: TokenLosses,
        reference_fingerprint: str,
    ) -> None:
        self.model, self.reference = model, reference
        self.fingerprint = sha256_text("excess", model_fingerprint, reference_fingerprint, "None")

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        pairs = [(record.prompt, record.answer) for record in records]
        both = zip(records, self.model(pairs), self.reference(pairs), strict=True)
        return np.array([self._excess(record, loss, better) for record, loss, better in both], np.float64)

    def _excess(self, record: Record, loss: NDArray[np.float32], better: NDArray[np.float32]) -> float:
        if not len(loss) or not len(better):
            return np.nan
        return float((loss.sum(dtype=np.float64) - better.sum(dtype=np.float64)) / len(record.answer.encode()))


class DifficultyOfFollowing(Scorer):
    """Score by instruction-following difficulty: the mean loss of the answer given its prompt, divided by its mean loss
    without the prompt (IFD, Li et al. 2023, arXiv 2308.12032). With a score near 0 the prompt determines the answer.
    Above 1 the prompt does not help; the paper takes this as a sign that prompt and answer do not match, so inspect
    such records before keeping them.

    NaN for plain documents and empty prompts, and for answers whose loss is 0 or missing.
    """

    name = "ifd"
    measures = "loss of the answer given its prompt over its loss alone (a ratio; above 1 the prompt does not help)"
    direction = Direction.improbable

    def __init__(self, losses: TokenLosses, fingerprint: str) -> None:
        self.losses = losses
        self.fingerprint = sha256_text("ifd", fingerprint)

    def score(self, records: Sequence[Record]) -> NDArray[np.float64]:
        scores = np.full(len(records), np.nan)
        places = [place for place, record in enumerate(records) if record.prompt.strip()]
        pairs = [(records[place].prompt, records[place].answer) for place in places]
        losses = self.losses([*pairs, *(("", answer) for _, answer in pairs)])  # one call, for full batches
        for place, with_prompt, alone in zip(places, losses[: len(pairs)], losses[len(pairs) :], strict=True):
            divisor = hardest_mean(alone)
            if divisor > 0:  # false for NaN, which is the mean of no tokens
                scores[place] = hardest_mean(with_prompt) / divisor
        return scores
