"""Asking questions: answers that the context cuts, and questions that are broken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.train.exam.test_exam_run import Parity, said
from train.eval.generate import Continuation
from train.exam.ask import continuation, greedy_answers
from train.exam.base import CutAnswer, NotAsked, Question
from train.exam.results import scores_by_step
from train.exam.run import run_exam

STOP = 0


class Letters:
    """A token for each letter."""

    bos_id, eos_id = 1, STOP

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class Model:
    """A model that answers with `text`, and then ends, or for ever with its last letter."""

    context: int
    text: str
    ends: bool = True
    tokenizer, images, pictures = Letters(), None, "no encoder"

    def continue_all(self, asked: Sequence[Continuation], batch_size: int) -> None:
        for one in asked:
            for place in range(10_000):
                rest = self.text[place : place + 1] or ("" if self.ends else self.text[-1])
                if not one.take(ord(rest) if rest else STOP, STOP):
                    break


def answers(model: Any, *questions: Question) -> Sequence[str | NotAsked]:
    return greedy_answers(model)(questions)


def test_an_answer_that_the_context_cuts_is_told_apart():
    """The prompt takes 5 of the tokens, with BOS. Controls: answers that end by EOS, a stop or their own limit."""
    question = Question("q", "Why?", max_tokens=10, stops=(".",))
    (cut,) = answers(Model(9, "because"), question)
    assert cut == "beca" and isinstance(cut, CutAnswer)
    for model in (Model(9, "yes"), Model(9, "abc. d"), Model(15, "because of this"), Model(40, "x", ends=False)):
        (whole,) = answers(model, question)
        assert not isinstance(whole, CutAnswer), whole
    (none,) = answers(Model(5, "yes"), question)
    assert none == NotAsked("it takes 5 tokens, but the model's context is 5")


def test_an_answer_has_the_tokens_that_the_context_leaves():
    for context, room in ((9, 4), (14, 9), (15, 10), (99, 10)):
        asked = continuation(Model(context, "x"), Question("q", "Why?", max_tokens=10))  # type: ignore[arg-type]
        assert isinstance(asked, Continuation) and asked.config.tokens == room


def test_answers_that_are_cut_are_counted_beside_the_score(tmp_path):
    found = run_exam(Parity(4), lambda questions: ["yes", CutAnswer("yes"), CutAnswer("half"), "no"]).plain()
    assert found["cut"] == "2 of 4 answers end where the model's context does"
    assert [one["cut"] for one in found["answers"]] == [False, True, True, False]
    whole = run_exam(Parity(4), said("yes")).plain()
    assert whole["cut"] is None, "control"
    line = {"suite": "own", "exams": {"some": found, "none": whole}}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    some, none = (str(one) for (one,) in scores_by_step(tmp_path / "evaluations.jsonl").values())
    assert some.endswith("; cut: 2 of 4 answers end where the model's context does") and "cut" not in none


@pytest.mark.parametrize("prompt", ["two<image> of <image>", "half \ud800 of a pair"])
def test_a_broken_question_is_not_asked_and_the_rest_is(prompt):
    broken, good = answers(Model(99, "yes"), Question("a", prompt), Question("b", "Why?"))
    assert isinstance(broken, NotAsked) and good == "yes"
    assert ("but 2 times <image>" in broken.reason) or ("surrogate pair" in broken.reason)
