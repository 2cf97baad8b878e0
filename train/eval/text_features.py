"""Compute features of prompts and answers from the embeddings or hidden states of a model, for the learned scorer.

Prompt and answer are tokenised separately, as for losses. Each pair is read alone and, on a CPU, by one thread, so that
its features do not depend on other pairs or on the number of processes, to the bit. Processes divide the pairs.

Shapes: N pairs, T tokens of a pair, D hidden size; the batch is always 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ConfigError
from core.files import sha256_text
from data.filter.config import FeatureKind, ScorerConfig
from data.filter.score.factory import Models
from data.filter.score.features import TEXT_BYTES
from data.filter.score.scorer import TextFeatures
from model.attention.plan import ForwardContext
from model.transformer import Transformer
from train.eval.scoring_model import ScoringModel
from train.eval.text_loss import open_by_name


def open_features(name: str, config: ScorerConfig, models: Models | None = None) -> tuple[TextFeatures, str]:
    """Open a model as `open_losses` does. Return the function for features of the kind `config.features`, and a
    fingerprint of all on which they depend.

    Features [N, S] are those of the prompt, then those of the answer. `embeddings`: mean and maximum of the input
    embeddings of all tokens, S = 4 D. `hidden`: mean of the hidden states after the last norm, S = 2 D, of
    `config.seq_len` tokens at most, or the model's own context. The answer is read after the prompt, which is cut to
    half of the context if both do not fit.
    """
    model = open_by_name(name, models)
    context = min(config.seq_len, model.context)
    match config.features:
        case FeatureKind.embeddings:
            read, context = partial(_embeddings, model, _embed_of(model)), 0
        case FeatureKind.hidden:
            read = partial(_hidden_states, model, _states_of(name, model), context)
        case FeatureKind.ngrams:
            raise ValueError("n-grams need no model")
    return read, sha256_text(config.features.value, model.fingerprint, str(context))


def _embeddings(
    model: ScoringModel, embed: Callable[[Tensor], Tensor], pairs: Sequence[tuple[str, str]]
) -> tuple[NDArray[np.float32], int]:
    with _one_thread():
        found = [
            [_pooled(embed(torch.tensor(ids, dtype=torch.int64)), True) for ids in both]
            for both in _encoded(model, pairs)
        ]
    return np.array([np.concatenate(both) for both in found]), 0


def _hidden_states(
    model: ScoringModel, states: Callable[[Tensor], Tensor], context: int, pairs: Sequence[tuple[str, str]]
) -> tuple[NDArray[np.float32], int]:
    found, cut = [], 0
    with _one_thread():
        for prompt, answer in _encoded(model, pairs):
            room = context - 1  # BOS comes first
            before = prompt[: max(room - len(answer), room // 2)]
            after = answer[: room - len(before)]
            cut += len(before) < len(prompt) or len(after) < len(answer)
            states_TD = states(torch.tensor([[model.tokenizer.bos_id, *before, *after]]))[0, 1:]
            found.append([_pooled(part, False) for part in states_TD.split([len(before), len(after)])])
    return np.array([np.concatenate(both) for both in found]), cut


def _encoded(model: ScoringModel, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of prompt and answer, of which as much is read as for n-grams."""
    first, second = (model.tokenizer.encode([pair[side][:TEXT_BYTES] for pair in pairs]) for side in (0, 1))
    yield from zip(map(list, first), map(list, second), strict=True)


def _pooled(x_TD: Tensor, with_maximum: bool) -> NDArray[np.float32]:
    """Return the mean, and the maximum, of each column; zeros without rows."""
    if not len(x_TD):
        return np.zeros((1 + with_maximum) * x_TD.shape[1], np.float32)
    mean_D = x_TD.double().mean(0).float()
    return (torch.cat([mean_D, x_TD.amax(0).float()]) if with_maximum else mean_D).cpu().numpy()


def _embed_of(model: ScoringModel) -> Callable[[Tensor], Tensor]:
    """Return a function from ids [T] to their input embeddings [T, D]."""
    network: Any = model.network
    embedding = network.embedding if isinstance(network, Transformer) else network.get_input_embeddings()
    return lambda ids_T: embedding(ids_T.to(model.device))


def _states_of(name: str, model: ScoringModel) -> Callable[[Tensor], Tensor]:
    """Return a function from ids [1, T] to the hidden states [1, T, D] after the last norm. The head is not applied
    to all of them, because it may cost more than the layers.
    """
    network: Any = model.network

    def foreign_states(ids_1T: Tensor) -> Tensor:
        found: Any = network.base_model(input_ids=ids_1T.to(model.device), use_cache=False)
        if not hasattr(found, "last_hidden_state"):
            raise ConfigError("", name, "returns no hidden states", ["features=embeddings"])
        return found.last_hidden_state

    def states(ids_1T: Tensor) -> Tensor:
        seen: list[Tensor] = []
        given = ForwardContext(torch.arange(ids_1T.shape[1])[None], model.device)
        given.last_B = torch.zeros(1, dtype=torch.int64, device=model.device)
        hook = list(network.layers.values())[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            network(ids_1T.to(model.device), given)
        finally:
            hook.remove()
        return network.final_norm(seen[0])

    return states if isinstance(network, Transformer) else foreign_states


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute without gradients and with one thread: sums of several threads differ in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
