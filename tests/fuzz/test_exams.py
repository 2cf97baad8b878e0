"""Answers of models to examinations, and files of questions."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.errors import ConfigError
from tests.fuzz.mutations import assert_reads_or_refuses, files, json_files
from train.exam.answers_text import UnreadableAnswer, read_number, read_roots, read_system
from train.exam.base import Verdict
from train.exam.knowledge import FactChoices, FactLists, MultipleChoice, ShortLists
from train.exam.mathematics import LinearSystems, Quadratics, WordProblems
from train.exam.pictures import SceneQuestions

ANSWERS = [
    *(
        b"infinitely many: x = 1 - t/2, y = 3(t - 1), z = -2.5",
        b"The answer is (1, 0, 2) + s(-1, 1/3, 0)",
        b"no solution",
    ),
    *(
        b"x1 = 2 or x_2 = 1 \xc2\xb1 3",
        b"$x \\in \\{\\frac{1}{2}, -3\\}$",
        b"1,200 + 3 = twelve",
        b"1. Mars\n2. the Earth",
    ),
]
EXAMS = [LinearSystems(3), Quadratics(3), WordProblems(2), FactLists(1), FactChoices(1), SceneQuestions(1)]


@example(b"x = 1/0")
@example("x = ½²".encode())
@given(st.sampled_from(ANSWERS).flatmap(files))
def test_any_answer_is_judged_or_unreadable(content):
    text = content.decode(errors="replace")
    for read in (lambda: read_system(text, ("x", "y", "z")), lambda: read_roots(text), lambda: read_number(text)):
        assert_reads_or_refuses(read, UnreadableAnswer)
    for exam in EXAMS:
        for question in exam.questions():
            assert isinstance(assert_reads_or_refuses(lambda e=exam, q=question: e.judge(q, text)), Verdict)


CHOICE = {"id": "1", "question": "Which?", "choices": ["Rome", "Paris"], "answer": 1}
LIST = {"question": "Which?", "items": ["Rome", ["Paris", "Lutetia"]], "optional": ["Bonn"]}


@pytest.mark.parametrize("kind, record", [(MultipleChoice, CHOICE), (ShortLists, LIST)], ids=["choices", "lists"])
@given(data=st.data())
def test_any_file_of_questions_is_read_or_refused(place, kind, record, data):
    path = place / "questions.jsonl"
    path.write_bytes(data.draw(json_files(record)))
    assert_reads_or_refuses(lambda: kind(str(path)).questions(), ConfigError)
