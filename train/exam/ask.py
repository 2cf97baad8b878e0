"""Ask a run, an imported or exported model, or a transformers model the questions of an examination."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import ConfigError
from train.eval.config import GenerateConfig
from train.eval.generate import Continuation, before_stops
from train.eval.multimodal import question as tokenized
from train.eval.scoring_model import ScoringModel
from train.exam.base import NotAsked, Question
from train.exam.run import Ask


def greedy_answers(model: ScoringModel, batch_size: int = 8) -> Ask:
    """Return a function that answers by greedy decoding, `batch_size` questions at a time. An answer also ends where
    the model's context does.

    The answer to a question that does not fit the context, or whose pictures the model cannot read, is `NotAsked`. The
    function raises `ConfigError` (key `suite`) for a question whose pictures and text do not match.
    """

    def ask(questions: Sequence[Question]) -> list[str | NotAsked]:
        asked = [_continuation(model, one) for one in questions]
        model.continue_all([one for one in asked if isinstance(one, Continuation)], batch_size)
        return [
            one
            if isinstance(one, NotAsked)
            else before_stops(
                model.tokenizer.decode(one.found if isinstance(one, Continuation) else one), question.stops
            )
            for one, question in zip(asked, questions, strict=True)
        ]

    return ask


def _continuation(model: ScoringModel, asked: Question) -> Continuation | list[int] | NotAsked:
    """Return what `ScoringModel.continue_all` continues, or the tokens of the answer of a model with a processor."""

    def encode(text: str) -> Sequence[int]:
        return model.tokenizer.encode([text])[0]

    def goes_on(found: list[int]) -> bool:
        text = model.tokenizer.decode(found)
        return not any(stop in text for stop in asked.stops)

    if asked.pictures and model.images is None:
        if isinstance(model.pictures, str):
            return NotAsked(model.pictures)
        try:
            length, inputs = model.pictures.read(asked.prompt, asked.pictures)
        except ConfigError as error:
            return NotAsked(error.reason)
        if length >= model.context:
            return _too_long(length, model.context)
        return model.pictures.continue_from(inputs, min(asked.max_tokens, model.context - length), goes_on)
    try:
        found = tokenized(asked.prompt, list(asked.pictures), model.images if asked.pictures else None, encode)
    except ConfigError as error:
        raise ConfigError("suite", None, f"question {asked.id} cannot be asked: {error.reason}") from None
    ids = [model.tokenizer.bos_id, *found.ids, *encode(found.last)]
    room = model.context - len(ids)
    if room < 1:
        return _too_long(len(ids), model.context)
    config = GenerateConfig(run="", tokens=min(asked.max_tokens, room), temperature=0.0, top_k=None)
    return Continuation(ids, config, goes_on, found.pixels_N3SS)


def _too_long(tokens: int, context: int) -> NotAsked:
    return NotAsked(f"it takes {tokens} tokens, but the model's context is {context}")
