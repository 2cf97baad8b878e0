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
from train.eval.scoring_model import ScoringModel, TextTokenizer
from train.exam.base import Question
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


def greedy_answers(model: ScoringModel, batch_size: int = 8) -> Ask:
    """Return a function that answers by greedy decoding, `batch_size` questions at a time. An answer also ends where
    the model's context does.

    The function raises `ConfigError` (key `suite`) for a question that does not fit the context, and for pictures that
    the model cannot read.
    """

    def ask(questions: Sequence[Question]) -> list[str]:
        asked = [continuation(model, one) for one in questions]
        model.continue_all(asked, batch_size)
        texts = [model.tokenizer.decode(one.found) for one in asked]
        return [before_stops(text, question.stops) for text, question in zip(texts, questions, strict=True)]

    return ask


def run_on_main(world: World, ask: Ask, examine: Callable[[Ask], T]) -> T:
    """Run `examine(ask)` on rank 0, which makes and judges examinations, while the other ranks of `world` answer the
    same questions. Return its result, or raise its exception, on every rank.
    """
    if world.size == 1:
        return examine(ask)
    has_failed = False

    def together(questions: Sequence[Question]) -> Sequence[str]:
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


def continuation(model: Asked, asked: Question) -> Continuation:
    """Turn a question into tokens. Raises `ConfigError` (key `suite`) if the model cannot be asked it."""

    def encode(text: str) -> Sequence[int]:
        return model.tokenizer.encode([text])[0]

    def goes_on(found: list[int]) -> bool:
        text = model.tokenizer.decode(found)
        return not any(stop in text for stop in asked.stops)

    try:
        found = tokenized(asked.prompt, list(asked.pictures), model.images if asked.pictures else None, encode)
    except ConfigError as error:
        raise ConfigError("suite", None, f"question {asked.id} cannot be asked: {error.reason}") from None
    ids = [model.tokenizer.bos_id, *found.ids, *encode(found.last)]
    room = model.context - len(ids)
    if room < 1:
        reason = f"question {asked.id} takes {len(ids)} tokens, but the model's context is {model.context}"
        raise ConfigError("suite", None, f"{reason}: give fewer solved examples (suite.exams.NAME.options.shots)")
    config = GenerateConfig(run="", tokens=min(asked.max_tokens, room), temperature=0.0, top_k=None)
    return Continuation(ids, config, goes_on, found.pixels_N3SS)
