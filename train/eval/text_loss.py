"""Compute per-token losses of a text that follows another text, for the filter's scorers.

The first and the second text are tokenised separately, so that the tokens of the second do not depend on the first. BOS
comes first, as in packed documents (EOS if the tokenizer has no BOS). A text longer than `context` is split into
overlapping windows of `context` tokens. The first window counts the losses of all its
tokens. Each later window uses its first half as context and counts only its second half (the last window, the rest of
the text). Later windows begin inside the text, at position 0 and without BOS, as packed sequences do.

The other texts in a batch change a loss in its last bits (by more if FP8 scales span the batch). Scores are cached for
that reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import ConfigError
from core.files import sha256_text
from data.filter.config import ScorerConfig
from data.filter.score.factory import Models
from data.filter.score.scorer import TokenLosses
from parallel.comm.world import World
from train.checkpoint.reader import IMPORTED
from train.eval.scoring_model import ScoringModel, TokenWindow, from_run, from_transformers


def open_losses(name: str, config: ScorerConfig, models: Models | None = None) -> tuple[TokenLosses, str]:
    """Open a model and return its token losses and their fingerprint. `name`: the directory of a run, or a directory or
    name that transformers opens.

    This process holds the whole model, on a GPU if it has one. The context is `config.seq_len`, or the model's own if
    that is shorter. `models`: as in `get_corpus`. Raises `ConfigError` with an empty key if the model does not exist or
    transformers is missing.
    """
    model = open_by_name(name, models)
    context = min(config.seq_len, model.context)
    return token_losses(model, context, config.batch_size), sha256_text(model.fingerprint, str(context))


def open_by_name(name: str, models: Models | None) -> ScoringModel:
    """Open a model that a scorer names, as `open_losses` does."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    folder = Path(name).expanduser()
    if (folder / "config.yaml").exists():
        return from_run(folder, World(0, 1, device), models=models)
    if (folder / IMPORTED).exists():
        raise ConfigError("", name, "is an imported model: name the Hugging Face folder that it was made from")
    return from_transformers(name, device)


def token_losses(model: ScoringModel, context: int, batch_size: int) -> TokenLosses:
    """Return a function that computes, for each pair of texts, the token losses of the second text after the first."""

    def losses(pairs: Sequence[tuple[str, str]]) -> list[NDArray[np.float32]]:
        first = model.tokenizer.encode([pair[0] for pair in pairs])
        second = model.tokenizer.encode([pair[1] for pair in pairs])
        found = []
        for text, (before, wanted) in enumerate(zip(first, second, strict=True)):
            found += windows(text, [model.tokenizer.bos_id, *before, *wanted], len(wanted), context)
        parts = model.losses(found, batch_size)
        results: list[list[NDArray[np.float32]]] = [[] for _ in pairs]
        for window, (losses_T, _) in zip(found, parts, strict=True):
            results[window.text].append(losses_T.numpy())
        return [np.concatenate(one) if one else np.zeros(0, np.float32) for one in results]

    return losses


def windows(text: int, ids: list[int], wanted: int, context: int) -> list[TokenWindow]:
    """Return the windows that together have the last `wanted` of `ids` as counted labels, in order. Windows end at the
    same positions for every `wanted`.
    """
    found, end, first = [], 0, len(ids) - wanted
    while end < len(ids) - 1:
        begin = end  # the last label of the window before
        end = min(begin + (max(1, context // 2) if begin else context), len(ids) - 1)
        counted = min(end - begin, end - first + 1)
        if counted > 0:
            found.append(TokenWindow(text, ids[max(0, end - context) : end + 1], counted))
    return found
