"""Ask a run, an imported or exported model, or a transformers model the questions of an examination."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from core.errors import ConfigError
from train.eval.config import GenerateConfig
from train.eval.generate import NextLogits, continue_tokens
from train.eval.multimodal import question as tokenized
from train.eval.scoring_model import ScoringModel
from train.exam.base import Question
from train.exam.run import Ask


def greedy_answers(model: ScoringModel) -> Ask:
    """Return a function that answers by greedy decoding. An answer also ends where the model's context does.

    The function raises `ConfigError` (key `suite`) for a question that does not fit the context, and for pictures that
    the model cannot read.
    """
    return lambda questions: [_answer(model, one) for one in questions]


def _answer(model: ScoringModel, asked: Question) -> str:
    def encode(text: str) -> Sequence[int]:
        return model.tokenizer.encode([text])[0]

    try:
        found = tokenized(asked.prompt, list(asked.pictures), model.images if asked.pictures else None, encode)
    except ConfigError as error:
        raise ConfigError("suite", None, f"question {asked.id} cannot be asked: {error.reason}") from None
    ids = [model.tokenizer.bos_id, *found.ids, *encode(found.last)]
    room = model.context - len(ids)
    if room < 1:
        reason = f"question {asked.id} takes {len(ids)} tokens, but the model's context is {model.context}"
        raise ConfigError("suite", None, f"{reason}: give fewer solved examples (suite.exams.NAME.options.shots)")
    next_logits: NextLogits = model.next_logits
    if found.pixels_N3SS is not None:
        next_logits = partial(model.next_logits, pixels_N3SS=found.pixels_N3SS, length=len(ids), kept=[])
    config = GenerateConfig(run="", tokens=min(asked.max_tokens, room), temperature=0.0, top_k=None)
    tokens: list[int] = []
    for token in continue_tokens(next_logits, ids, model.context, config, model.tokenizer.eos_id):
        tokens.append(token)
        text = model.tokenizer.decode(tokens)
        if ends := [text.index(stop) for stop in asked.stops if stop in text]:
            return text[: min(ends)]
    return model.tokenizer.decode(tokens)
