"""Scorers that need no labels, as candidates for a default: n-grams, compression, counts and small models.

Every model is cross-fitted: each half of the records (`fold`) is scored by what was fitted to the other half. Small
models are transformers with 130 and 350 thousand parameters over 1,024 BPE tokens, trained for a minute on one core.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from bench.data.problems import Problem, records
from data.filter.input.records import Record
from data.filter.score.baselines import LengthScorer, RandomScorer
from data.filter.score.ngram import NgramScorer
from data.filter.score.scorer import FOLDS, fold, hardest_mean

Numbers = NDArray[np.float64]
_TOKENS, _VOCABULARY, _BATCH, _EPOCHS, _LEARNING_RATE = 256, 1024, 16, 4, 3e-3
_SMALL_SAMPLE = 20_000
"""Bytes of text from which the n-gram model of little data learns."""


def scores_of(problems: Sequence[Problem], small_models: bool) -> dict[str, Numbers]:
    """Return the scores of the controls and the candidates, by name. `small_models`: train those too (minutes)."""
    found = _without_training(problems)
    if small_models:
        found |= _with_small_models(problems, found["ngram"])
    return found


def _without_training(problems: Sequence[Problem]) -> dict[str, Numbers]:
    data = records(problems)
    answers = [problem.response for problem in problems]
    prompts = [Record(one.id, one.domain, one.source, one.prompt) for one in data]
    both = [record.text for record in data]
    loss = _ngram(data)
    low, high, little = _ngram(data, order=2), _ngram(data, order=8), _ngram(data, sample_bytes=_SMALL_SAMPLE)
    packed = {name: _count(texts, _packed) for name, texts in (("answer", answers), ("both", both))}
    packed["prompt"] = _count([one.text for one in prompts], _packed)
    quantities = _count(both, lambda text: len(set(re.findall(r"\d+", text))))
    operators = _count(both, lambda text: len(re.findall(r"[-+*/=<>^%]|\\[a-z]+", text)))
    return {
        "random": RandomScorer().score(data),
        "length": LengthScorer().score(data),
        "length of the prompt": _count([one.text for one in prompts], len),
        "ngram": loss,
        "ngram, hardest 64 bytes": _ngram(data, window=64),
        "ngram of the prompt": _ngram(prompts),
        "share of the loss that order 8 saves": (low - high) / low,
        "share of the loss that more data save": (little - loss) / little,
        "share of the answer that is new (zlib)": (packed["both"] - packed["prompt"]) / packed["answer"],
        "count of distinct numbers": quantities,
        "count of operators": operators,
        "mean rank of ngram and both counts": _mean_rank(loss, quantities, operators),
    }


def _ngram(data: list[Record], **settings: int) -> Numbers:
    scorer = NgramScorer(**settings)
    scorer.fit(lambda: data)
    return scorer.score(data)


def _packed(text: str) -> int:
    return len(zlib.compress(text.encode(), 9))


def _count(texts: Sequence[str], count: Callable[[str], int]) -> Numbers:
    return np.array([count(text) for text in texts], np.float64)


def _mean_rank(*scores: Numbers) -> Numbers:
    return np.mean([rankdata(np.nan_to_num(one, nan=float(np.nanmedian(one)))) for one in scores], axis=0)


@dataclass(frozen=True)
class _Encoded:
    """Tokens of prompt and answer; `answer` is the place of the first token of the answer."""

    tokens: list[int]
    answer: int


class _SmallModel(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(_VOCABULARY, width), nn.Embedding(_TOKENS, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        count = tokens_BT.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(count)
        hidden = self.embedding(tokens_BT) + self.position(torch.arange(count))
        return self.blocks(hidden, mask=mask, is_causal=True) @ self.embedding.weight.T


def _with_small_models(problems: Sequence[Problem], ngram: Numbers) -> dict[str, Numbers]:
    """Return scores from the token losses of two models, one also at a third of its training."""
    data = records(problems)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([record.text for record in data], trainer)
    whole = [_encode(tokenizer, problem.prompt + "\n", problem.response) for problem in problems]
    alone = [_encode(tokenizer, "\n", problem.response) for problem in problems]
    losses: dict[str, list[Numbers]] = {name: [np.empty(0)] * len(data) for name in ("early", "late", "weak", "alone")}
    folds = np.array([fold(record) for record in data])
    for side in range(FOLDS):
        seen, places = [whole[n] for n in np.flatnonzero(folds != side)], np.flatnonzero(folds == side)
        strong, weak = _SmallModel(96, 2), _SmallModel(64, 1)
        steps = len(seen) * _EPOCHS // _BATCH
        _train(strong, seen, range(steps // 3), steps)
        wanted = [("early", strong, whole)]
        _fill(losses, wanted, places)
        _train(strong, seen, range(steps // 3, steps), steps)
        _train(weak, seen, range(steps), steps)
        _fill(losses, [("late", strong, whole), ("weak", weak, whole), ("alone", strong, alone)], places)
    mean = {name: np.array([one.mean() for one in many]) for name, many in losses.items()}
    last = np.array(
        [one[_last_number(tokenizer, text)].mean() for one, text in zip(losses["late"], whole, strict=True)]
    )
    pairs = list(zip(losses["late"], losses["weak"], strict=True))
    early_share = (mean["early"] - mean["late"]) / mean["early"]
    return {
        "loss of a small model": mean["late"],
        "its loss over the hardest 16 tokens": np.array([hardest_mean(one, 16) for one in losses["late"]]),
        "its loss over its loss without the prompt": mean["late"] / mean["alone"],
        "its loss minus its loss without the prompt": mean["late"] - mean["alone"],
        "share of its loss that training saved late": early_share,
        "tokens that it forgot": np.array(
            [np.mean(late > early + 0.1) for early, late in zip(losses["early"], losses["late"], strict=True)]
        ),
        "disagreement of two small models": np.array([np.abs(a - b).mean() for a, b in pairs]),
        "loss of a smaller model minus its loss": mean["weak"] - mean["late"],
        "its loss on the last number": last,
        "mean rank of both losses": _mean_rank(ngram, mean["late"]),
    }


def _encode(tokenizer: Tokenizer, prompt: str, answer: str) -> _Encoded:
    """Return the tokens; too long a prompt loses its beginning, and then too long an answer its end."""
    first, second = tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids[: _TOKENS - 32]
    first = first[-max(_TOKENS - len(second), 1) :]
    return _Encoded(first + second, len(first))


def _last_number(tokenizer: Tokenizer, one: _Encoded) -> slice:
    """Return the place of the last number among the answer's tokens; all of them if it has none."""
    digits = [tokenizer.decode([token]).strip().isdigit() for token in one.tokens[one.answer :]]
    if True not in digits:
        return slice(None)
    end = len(digits) - digits[::-1].index(True)
    begin = end - 1
    while begin and digits[begin - 1]:
        begin -= 1
    return slice(begin, end)


def _padded(many: Sequence[_Encoded]) -> Tensor:
    longest = max(len(one.tokens) for one in many)
    return torch.tensor([one.tokens + [0] * (longest - len(one.tokens)) for one in many])


def _train(model: _SmallModel, seen: Sequence[_Encoded], steps: range, total: int) -> None:
    """Train for these of `total` steps, on prompts and answers, with a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, betas=(0.9, 0.95))
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min((step + 1) / 20, 1 - step / total)
        order = np.random.default_rng(step * _BATCH // len(seen)).permutation(len(seen))
        chosen = order[np.arange(step * _BATCH, (step + 1) * _BATCH) % len(seen)]
        tokens_BT = _padded([seen[n] for n in chosen])
        logits = model(tokens_BT[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _fill(
    losses: dict[str, list[Numbers]],
    wanted: Sequence[tuple[str, _SmallModel, list[_Encoded]]],
    places: NDArray[np.int64],
) -> None:
    """Store the losses of the answers' tokens at `places`, in nats, under each name."""
    for name, model, texts in wanted:
        ordered = sorted(places.tolist(), key=lambda n: len(texts[n].tokens))
        for begin in range(0, len(ordered), 64):
            batch = ordered[begin : begin + 64]
            tokens_BT = _padded([texts[n] for n in batch])
            logits = model(tokens_BT[:, :-1]).transpose(1, 2)
            loss_BT = functional.cross_entropy(logits, tokens_BT[:, 1:], reduction="none").double().numpy()
            for row, n in enumerate(batch):
                losses[name][n] = loss_BT[row, texts[n].answer - 1 : len(texts[n].tokens) - 1]
