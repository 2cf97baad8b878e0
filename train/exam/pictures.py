"""Examine pictures: counting, colours and places of things in generated scenes that training never shows.

Scenes with the same `seed`, `size` and `distractors` as those of the training data are held out by their numbers
(`data.images.generated.scenes.held_out`). The same questions with another scene's picture, whose answer differs, and
with a black one are the controls: they show what a score owes to the text alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import count
from typing import ClassVar

from core.errors import check_numbers
from data.images.decode import pillow
from data.images.generated.draws import Draws
from data.images.generated.scenes import COLOURS, NUMBERS, THINGS, Scene, SceneConfig, held_out, scene
from data.images.packages import require
from train.eval.multimodal import PLACEHOLDER
from train.exam.base import Exam, Outcome, Question, Verdict

_MARGIN = 1 / 16
"""Least distance of a thing's centre from the middle, as a share of the picture, if its place is asked for."""


class SceneSubject(Enum):
    count = "count"
    """How many there are, 0 to 9."""
    colour = "colour"
    """The colour of all things of a kind."""
    place = "place"
    """In which half of the picture a single thing is: left or right, or top or bottom."""


class ShownPicture(Enum):
    own = "own"
    other = "other"
    """That of a scene to which the question has another answer."""
    black = "black"


@dataclass(frozen=True)
class AskedScene:
    """`words`: the answers that the question allows."""

    picture: Scene
    text: str
    answer: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Scenes:
    """Questions about generated scenes. The answer is a number in digits or as a word, a colour, or a side; a text that
    names several is unreadable. The figure `within_one`, of counting, is the share of answers that miss by at most 1.
    """

    number: int = 50
    """Questions."""
    subject: SceneSubject = SceneSubject.count
    """What is asked for."""
    seed: int = 0
    """Seed of the scenes."""
    size: int = 112
    """Width and height of a picture in pixels."""
    distractors: int = 0
    """Most things of another kind in a scene."""
    shown: ShownPicture = ShownPicture.own
    """Which picture goes with a question."""

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_numbers(self, positive=("number",))
        require("PIL")
        SceneConfig(self.seed, self.size, self.distractors)

    @property
    def name(self) -> str:
        return f"scenes_{self.subject.value}"

    def questions(self) -> Sequence[Question]:
        return self._questions

    @cached_property
    def _questions(self) -> list[Question]:
        scenes = self._suitable()
        asked = [next(scenes) for _ in range(self.number + self.number % 2)]  # with an odd number the last is a spare
        spare = next(one for one in scenes if one.answer != asked[0].answer)
        found = []
        for place, one in enumerate(asked[: self.number]):
            prompt = f"{PLACEHOLDER}{one.text}"
            picture = self._picture(one, place, [*asked[place + 1 :], *asked[:place], spare])
            reference = (one.answer, one.words)
            found.append(Question(f"{self.name}-{place}", prompt, reference, (picture,), 8, ("\n",)))
        return found

    def _picture(self, one: AskedScene, place: int, others: list[AskedScene]) -> bytes:
        match self.shown:
            case ShownPicture.own:
                return one.picture.png
            case ShownPicture.other:
                return next(other for other in others if _differs(one, other)).picture.png
            case ShownPicture.black:
                file = io.BytesIO()
                pillow().new("RGB", (self.size, self.size)).save(file, "PNG")
                return file.getvalue()

    def controls(self) -> Mapping[str, Exam]:
        if self.shown is not ShownPicture.own:
            return {}
        return {f"{one.value}_picture": replace(self, shown=one) for one in (ShownPicture.other, ShownPicture.black)}

    def judge(self, question: Question, answer: str) -> Verdict:
        expected, words = question.reference
        said = set(re.findall(r"[a-z]+|\d+", answer.lower()))
        if self.subject is SceneSubject.count:
            said = {str(NUMBERS.index(one)) if one in NUMBERS else one for one in said}
            found = {one.lstrip("0") or "0" for one in said if one.isdecimal()}
        else:
            found = said & set(words)
        if len(found) != 1:
            note = f"names {len(found)} answers"
            return Verdict(Outcome.unreadable, 0, note, self._figures(expected, None))
        (one,) = found
        outcome = Outcome.right if one == expected else Outcome.wrong
        return Verdict(outcome, int(one == expected), f"said {one[:20]}", self._figures(expected, one))

    def _figures(self, expected: str, said: str | None) -> dict[str, float]:
        if self.subject is not SceneSubject.count:
            return {}
        return {"within_one": float(said is not None and len(said) < 9 and abs(int(said) - int(expected)) <= 1)}

    def _suitable(self) -> Iterator[AskedScene]:
        """Yield the held-out scenes about which the question can be asked."""
        config = SceneConfig(self.seed, self.size, self.distractors)
        for index in count():
            one = scene(held_out(index), config)
            match self.subject:
                case SceneSubject.count:
                    yield AskedScene(one, one.question, one.answer, ())
                case SceneSubject.colour if one.count:
                    are, kind = ("is", one.kind) if one.count == 1 else ("are", THINGS[one.kind])
                    yield AskedScene(one, f"Which colour {are} the {kind}?", one.colour, tuple(COLOURS))
                case SceneSubject.place if one.count == 1:
                    yield from self._placed(one, Draws("place", self.seed, index).below(2))

    def _placed(self, one: Scene, axis: int) -> Iterator[AskedScene]:
        thing = next(thing for thing in one.things if thing.kind == one.kind)
        words, at = ((("left", "right"), thing.x), (("top", "bottom"), thing.y))[axis]
        if abs(at - self.size / 2) >= self.size * _MARGIN:
            text = f"Is the {one.kind} in the {words[0]} or the {words[1]} half?"
            yield AskedScene(one, text, words[at > self.size / 2], words)


def _differs(one: AskedScene, other: AskedScene) -> bool:
    """Return whether the answer to the question about `one` would be another for the picture of `other`."""
    if one.words and one.words != other.words and len(one.words) == 2:
        return False
    return one.answer != other.answer
