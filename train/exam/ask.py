"""Ask a run, an imported or exported model, or a transformers model the questions of an examination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from core.errors import ConfigError
from data.images.decode import BadImage
from data.images.media import ImageDescription
from parallel.comm.world import World
from train.eval.config import GenerateConfig
from train.eval.generate import Continuation, before_stops, until
from train.eval.multimodal import question as tokenized
from train.eval.scoring_model import PictureModel, ScoringModel, TextTokenizer
from train.exam.base import CutAnswer, NotAsked, Question
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
    """Return a function that answers by greedy decoding, `batch_size` questions at a time.

    A question is asked with what room the context leaves for its answer. An answer that ends because the context does
    is a `CutAnswer`. The answer to a question that does not fit the context, whose pictures the model cannot read, or
    that is broken, is `NotAsked`.
    """

    def ask(questions: Sequence[Question]) -> list[str | NotAsked]:
        asked = [continuation(model, one) for one in questions]
        model.continue_all([one for one in asked if isinstance(one, Continuation)], batch_size)
        return [
            _text(model, question, one.found, one.config.tokens) if isinstance(one, Continuation) else one
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


def continuation(model: Asked, asked: Question) -> Continuation | str | NotAsked:
    """Return what `ScoringModel.continue_all` continues, or the answer of a model with a processor."""

    def encode(text: str) -> Sequence[int]:
        return model.tokenizer.encode([text])[0]

    goes_on = until(asked.stops, model.tokenizer.decode)
    if not is_unicode(asked.prompt):
        return NotAsked("its prompt has half of a surrogate pair, which is no character")
    if asked.pictures and model.images is None:
        if isinstance(model.pictures, str):
            return NotAsked(model.pictures)
        try:
            length, inputs = model.pictures.read(asked.prompt, asked.pictures)
        except ConfigError as error:
            return NotAsked(error.reason)
        except BadImage as error:
            return NotAsked(str(error))
        if length >= model.context:
            return _too_long(length, model.context)
        limit = min(asked.max_tokens, model.context - length)
        return _text(model, asked, model.pictures.continue_from(inputs, limit, goes_on), limit)
    try:
        found = tokenized(asked.prompt, list(asked.pictures), model.images if asked.pictures else None, encode)
    except ConfigError as error:
        return NotAsked(error.reason)
    ids = [model.tokenizer.bos_id, *found.ids, *encode(found.last)]
    room = model.context - len(ids)
    if room < 1:
        return _too_long(len(ids), model.context)
    config = GenerateConfig(run="", tokens=min(asked.max_tokens, room), temperature=0.0, top_k=None)
    return Continuation(ids, config, goes_on, found.pixels_N3SS)


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: JSON may have half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(model: Asked, asked: Question, found: list[int], limit: int) -> str:
    """Return the answer of the tokens `found`, of which there can be `limit`."""
    text = model.tokenizer.decode(found)
    is_cut = limit < asked.max_tokens and len(found) >= limit and not any(stop in text for stop in asked.stops)
    answer = before_stops(text, asked.stops)
    return CutAnswer(answer) if is_cut else answer


def _too_long(tokens: int, context: int) -> NotAsked:
    return NotAsked(f"it takes {tokens} tokens, but the model's context is {context}")
