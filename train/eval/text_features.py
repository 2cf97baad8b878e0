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

    Features [N, 4 D] are the mean and the maximum over the tokens of the prompt, then those of the answer. `embeddings`
    pools the input embeddings of all tokens. `hidden` pools the hidden states after the middle layer, of at most
    `config.seq_len` tokens or the model's own context. The answer is read after the prompt, which is cut to half of the
    context if both do not fit.
    """
    model = open_by_name(name, models)
    match config.features:
        case FeatureKind.embeddings:
            context, compute = None, _embeddings(model.network)
        case FeatureKind.hidden:
            context, compute = min(config.seq_len, model.context), _hidden_states(name, model.network)
        case FeatureKind.ngrams:
            raise ValueError("n-grams need no model")
    fingerprint = sha256_text(config.features.value, model.fingerprint, str(context))
    return partial(_features, model, compute, context), fingerprint


def _features(
    model: ScoringModel, compute: Callable[[Tensor], Tensor], context: int | None, pairs: Sequence[tuple[str, str]]
) -> tuple[NDArray[np.float32], int]:
    """Return the pooled vectors that `compute` makes of the ids [1, T] of each pair, and the number of pairs cut."""
    # as much is read as for n-grams
    first, second = (model.tokenizer.encode([pair[side][:TEXT_BYTES] for pair in pairs]) for side in (0, 1))
    found, cut = [], 0
    with _one_thread():
        for prompt, answer in zip(first, second, strict=True):
            before, after = prompt, answer
            if context is not None:
                room = context - 1  # BOS comes first
                before = prompt[: max(room - len(answer), room // 2)]
                after = answer[: room - len(before)]
            cut += len(before) < len(prompt) or len(after) < len(answer)
            x_TD = compute(torch.tensor([[model.tokenizer.bos_id, *before, *after]], device=model.device))[0, 1:]
            parts = x_TD.split([len(before), len(after)])
            found.append(torch.cat([pooled for part in parts for pooled in _pooled(part)]).cpu().numpy())
    return np.array(found), cut


def _pooled(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the maximum of each column, float32 [D]; zeros without tokens."""
    if not len(x_TD):
        x_TD = x_TD.new_zeros(1, x_TD.shape[1])
    return x_TD.double().mean(0).float(), x_TD.amax(0).float()


def _embeddings(network: Any) -> Callable[[Tensor], Tensor]:
    found: Any = network.embedding if isinstance(network, Transformer) else network.get_input_embeddings()
    return found


def _hidden_states(name: str, network: Any) -> Callable[[Tensor], Tensor]:
    """Return a function from ids [1, T] to the hidden states [1, T, D] after layer (layers + 1) // 2, counted from 1.
    docs/filter.md compares it with other layers.
    """

    def foreign(ids_1T: Tensor) -> Tensor:
        found = network.base_model(input_ids=ids_1T, use_cache=False, output_hidden_states=True)
        states = getattr(found, "hidden_states", None)
        if not states:
            raise ConfigError("", name, "returns no hidden states: use scorer.features=embeddings")
        return states[len(states) // 2]

    def ours(ids_1T: Tensor) -> Tensor:
        seen: list[Tensor] = []
        given = ForwardContext(torch.arange(ids_1T.shape[1])[None], ids_1T.device)
        given.last_B = torch.zeros(1, dtype=torch.int64, device=ids_1T.device)  # the head costs nothing
        hook = list(network.layers.values())[(len(network.layers) - 1) // 2].register_forward_hook(
            lambda layer, arguments, output: seen.append(output)
        )
        with hook:
            network(ids_1T, given)
        return seen[0]

    return ours if isinstance(network, Transformer) else foreign


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
