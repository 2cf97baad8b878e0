"""Examine pictures: counting, colours and places of things in generated scenes that training never shows.

Scenes with the same `seed`, `size` and `distractors` as those of the training data are held out by their numbers
(`data.images.generated.scenes.held_out`). The same questions with another scene's picture, whose answer differs, and
with a black one are the controls: they show what a score owes to the text alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, cached_property
from itertools import chain, count, islice
from typing import ClassVar

from core.errors import ConfigError, check_numbers
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

    def differs(self, other: AskedScene) -> bool:
        """Return whether this question has another answer for the picture of `other`, whichever thing is meant."""
        there = other.picture.things
        kind = sum(thing.kind == self.picture.kind for thing in there)
        is_answer = self.answer in (other.answer, str(kind), *(thing.colour for thing in there))
        return self.words == other.words and not is_answer


@dataclass(frozen=True)
class SceneQuestions:
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
    thing: str | None = None
    """Ask for this kind only, such as pencil; null: for all kinds."""
    shown: ShownPicture = ShownPicture.own
    """Which picture goes with a question."""

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_numbers(self, positive=("number",))
        require("PIL")
        SceneConfig(self.seed, self.size, self.distractors)
        if self.thing is not None and self.thing not in THINGS:
            raise ConfigError("thing", self.thing, "no such kind", list(THINGS))

    @property
    def name(self) -> str:
        return f"scenes_{self.subject.value}"

    def questions(self) -> Sequence[Question]:
        return self._questions

    @cached_property
    def _questions(self) -> list[Question]:
        asked = list(islice(self._suitable(), self.number))
        found = []
        for place, one in enumerate(asked):
            others = chain(asked[place + 1 :], asked[:place], self._suitable())
            picture = self._picture(one, others)
            name, prompt = f"{self.name}-{place}", f"{PLACEHOLDER}{one.text}"
            found.append(Question(name, prompt, (one.answer, one.words), (picture,), max_tokens=8, stops=("\n",)))
        return found

    def _picture(self, one: AskedScene, others: Iterable[AskedScene]) -> bytes:
        match self.shown:
            case ShownPicture.own:
                return one.picture.png
            case ShownPicture.other:
                return next(other for other in others if one.differs(other)).picture.png
            case ShownPicture.black:
                return black_picture(self.size)

    def controls(self) -> Mapping[str, Exam]:
        if self.shown is not ShownPicture.own:
            return {}
        return {f"{one.value}_picture": replace(self, shown=one) for one in (ShownPicture.other, ShownPicture.black)}

    def judge(self, question: Question, answer: str) -> Verdict:
        expected, words = question.reference
        said = set(re.findall(r"[a-z]+|\d+", answer.lower()))
        if self.subject is SceneSubject.count:
            said = {"0" if one in ("zero", "none") else one for one in said}
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
            if self.thing not in (None, one.kind):
                continue
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


@cache
def black_picture(size: int) -> bytes:
    file = io.BytesIO()
    pillow().new("RGB", (size, size)).save(file, "PNG")
    return file.getvalue()
