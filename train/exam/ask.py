"""Ask a run, an imported or exported model, or a transformers model the questions of an examination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from core.errors import ConfigError
from data.images.media import ImageDescription
from parallel.comm.world import World
from train.eval.config import GenerateConfig
from train.eval.generate import Continuation, before_stops
from train.eval.multimodal import question as tokenized
from train.eval.scoring_model import PictureModel, ScoringModel, TextTokenizer
from train.exam.base import NotAsked, Question
from train.exam.run import Ask

T = TypeVar("T")
_QUESTIONS, _RESULT = "questions", "result"
"""What rank 0 sends to the others."""


class Asked(Protocol):
    """What of a model decides how a question becomes tokens: see `ScoringModel`."""

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def context(self) -> int: ...

    @property
    def images(self) -> ImageDescription | None: ...

    @property
    def pictures(self) -> PictureModel | str: ...


def greedy_answers(model: ScoringModel, batch_size: int = 8) -> Ask:
    """Return a function that answers by greedy decoding, `batch_size` questions at a time. An answer also ends where
    the model's context does.

    The answer to a question that does not fit the context, or whose pictures the model cannot read, is `NotAsked`. The
    function raises `ConfigError` (key `suite`) for a question whose pictures and text do not match.
    """

    def ask(questions: Sequence[Question]) -> list[str | NotAsked]:
        asked = [continuation(model, one) for one in questions]
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


def run_on_main(world: World, ask: Ask, examine: Callable[[Ask], T]) -> T:
    """Run `examine(ask)` on rank 0, which makes and judges examinations, while the other ranks of `world` answer the
    same questions. Return its result, or raise its exception, on every rank.
    """
    if world.size == 1:
        return examine(ask)
    has_failed = False

    def together(questions: Sequence[Question]) -> Sequence[str | NotAsked]:
        nonlocal has_failed
        world.from_main(lambda: (_QUESTIONS, [replace(one, reference=None) for one in questions]))
        has_failed = True  # until it has not: all ranks raise the same error
        texts = ask(questions)
        has_failed = False
        return texts

    if world.is_main:
        try:
            result = examine(together)
        except Exception as error:
            if not has_failed:
                world.from_main(partial(_raise, error))
            raise
        return world.from_main(lambda: (_RESULT, result))[1]
    while True:
        kind, content = world.from_main(_unused)
        if kind == _RESULT:
            return content
        ask(content)


def _unused() -> tuple[str, Any]:
    """Stand for what rank 0 computes on a rank that receives it."""
    raise AssertionError


def _raise(error: Exception) -> None:
    raise error


def continuation(model: Asked, asked: Question) -> Continuation | list[int] | NotAsked:
    """Return what `ScoringModel.continue_all` continues, or the tokens of the answer of a model with a processor.

    Raises `ConfigError` (key `suite`) for a question whose pictures and text do not match.
    """

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
