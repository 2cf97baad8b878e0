"""Questions about scenes: answers follow from the scene, and the controls ask the same about other pictures."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from data.images.generated.scenes import COLOURS, SceneConfig, held_out, scene
from train.exam.base import Outcome, fingerprint
from train.exam.pictures import SceneQuestions, SceneSubject, ShownPicture

FORMS = (" {}", "{}.", "The answer: {}", "I see {} of them")
OTHER = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "red": "blue"}


@pytest.mark.parametrize("subject", SceneSubject, ids=lambda one: one.value)
def test_right_answers_are_right_and_wrong_ones_wrong(subject):
    exam = SceneQuestions(12, subject, distractors=3)
    for question in exam.questions():
        expected, words = question.reference
        other = OTHER.get(expected, "red") if words else str(int(expected) + 1)
        assert all(exam.judge(question, form.format(expected)).outcome is Outcome.right for form in FORMS)
        assert all(exam.judge(question, form.format(other)).outcome is Outcome.wrong for form in FORMS)
        for answer in ("", "perhaps", f"{expected} or {other}"):
            assert exam.judge(question, answer).outcome is Outcome.unreadable
    if subject is SceneSubject.count:
        one = next(one for one in exam.questions() if one.reference[0] == "5")
        assert exam.judge(one, "five boxes").score == 1
        assert [exam.judge(one, said).figures["within_one"] for said in ("4", "seven", "x", "9" * 99)] == [1, 0, 0, 0]


def test_answers_are_seen_in_the_picture():
    """The colour is that of the most pixels that are not grey; the place is where they are."""
    for subject in (SceneSubject.colour, SceneSubject.place):
        for question in SceneQuestions(8, subject).questions():
            picture = Image.open(io.BytesIO(question.pictures[0]))
            points = {(x, y): picture.getpixel((x, y)) for x in range(112) for y in range(112)}
            seen = [(name, at) for at, value in points.items() for name, rgb in COLOURS.items() if value == rgb]
            if subject is SceneSubject.colour:
                assert {name for name, _ in seen} == {question.reference[0]}
                continue
            x, y = (sum(at[axis] for _, at in seen) / len(seen) for axis in (0, 1))
            sides = {"left" if x < 56 else "right", "top" if y < 56 else "bottom"}
            assert question.reference[0] in sides


def test_scenes_are_held_out_and_change_with_the_seed():
    first = SceneQuestions(4).questions()
    assert [one.pictures[0] for one in first] == [scene(held_out(i), SceneConfig()).png for i in range(4)]
    assert fingerprint(SceneQuestions(4)) == fingerprint(SceneQuestions(4)) != fingerprint(SceneQuestions(4, seed=1))


@pytest.mark.parametrize("subject", SceneSubject, ids=lambda one: one.value)
def test_controls_ask_the_same_about_other_pictures(subject):
    exam = SceneQuestions(5, subject)
    controls = exam.controls()
    assert list(controls) == ["other_picture", "black_picture"]
    for control in controls.values():
        pairs = list(zip(exam.questions(), control.questions(), strict=True))
        assert all(a.prompt == b.prompt and a.reference == b.reference and a.pictures != b.pictures for a, b in pairs)
    answers = {one.pictures: one.reference[0] for one in SceneQuestions(200, subject).questions()}
    for one in controls["other_picture"].questions():
        assert answers[one.pictures] != one.reference[0]
    assert len({one.pictures for one in controls["black_picture"].questions()}) == 1
    assert SceneQuestions(5, subject, shown=ShownPicture.black).controls() == {}
