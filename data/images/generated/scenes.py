"""Generate counted scenes: pictures with 0 to 9 things of a kind, a question about their number, and a caption.

A scene is a pure function of (seed, number), so a corpus of them needs no files and has no end. The layout is computed
with whole numbers and is the same on every machine. The bytes of the PNG and the grey levels at edges may differ
between versions of Pillow and zlib.

What can be learnt: a question names the kind, so its answer follows from the picture. A caption lists what is in the
picture, the larger number first, and so follows from the picture too: "four stars and two balls" says the same
whichever kind is asked for. A kind that is absent is not named, since the picture does not show which one it would be;
the caption of an empty picture is "nothing". Without distractors one in ten pictures is empty; they differ by their
backgrounds.

Training uses the numbers from 0 on, held-out scenes the negative ones: `held_out(0)`, `held_out(1)`, ...
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from typing import Any

from core.errors import ConfigError
from data.images.generated.draws import Draws
from data.images.packages import require

THINGS = {"pencil": "pencils", "ball": "balls", "star": "stars", "box": "boxes", "moon": "moons", "cross": "crosses"}
"""Each kind and its plural."""
COLOURS = {
    "red": (205, 30, 45),
    "blue": (25, 85, 205),
    "green": (20, 130, 60),
    "orange": (235, 115, 0),
    "purple": (130, 45, 165),
}
DARKEST, BRIGHTEST = 118, 138
"""Least and largest value of the background's channels: in the middle of the range, where the mean of photographs is.
On white the same large vector is in every patch, and the encoder must learn to subtract it first: learning to count
then begins about 150 steps later.
"""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST = len(NUMBERS) - 1
_TURNS, _FINE, _TRIES = 16, 8, 60
"""Directions of a thing; how much larger a thing is drawn before it is reduced; places tried before a restart."""
_DENSITY = 1 / 3
"""Largest share of the picture that the circles around all things and their gaps cover."""


class SceneTask(Enum):
    """What the text after the picture is: a question for the number of a kind, or a caption."""

    question = "question"
    caption = "caption"


@dataclass(frozen=True)
class SceneConfig:
    seed: int = 0
    size: int = 112
    """Width and height of a picture in pixels."""
    distractors: int = 0
    """Most things of another kind in a scene; their number is from 0 to this."""
    task: SceneTask = SceneTask.question

    def __post_init__(self) -> None:
        if not 84 <= self.size <= 1024:
            raise ConfigError("size", self.size, "must be from 84 to 1024 pixels, so that things can be told apart")
        if not 0 <= self.distractors <= MOST:
            raise ConfigError("distractors", self.distractors, f"must be from 0 to {MOST}")

    @property
    def gap(self) -> int:
        """Least distance between the circles around two things, in pixels."""
        return self.size // 32

    @property
    def radii(self) -> tuple[int, int]:
        """Smallest and largest radius of a thing. It does not depend on the scene's number of things, which would
        give the answer away.
        """
        most = MOST + self.distractors
        largest = int(math.sqrt(self.size**2 * _DENSITY / (math.pi * most)) - self.gap / 2)
        return max(1, largest * 3 // 4), largest


@dataclass(frozen=True)
class Thing:
    """A thing with its centre and the radius of the circle around it, in pixels, and its direction."""

    kind: str
    colour: str
    x: int
    y: int
    radius: int
    turn: int


@dataclass(frozen=True)
class Scene:
    """`kind` is asked for and is there `count` times. `distractor` is None if there is no thing of another kind."""

    size: int
    kind: str
    count: int
    colour: str
    distractor: str | None
    distractors: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]
    task: SceneTask

    @property
    def question(self) -> str:
        return f"How many {THINGS[self.kind]}?"

    @property
    def answer(self) -> str:
        return str(self.count)

    @property
    def caption(self) -> str:
        """List what is in the picture: the larger number first, and equal ones in the order of `THINGS`."""
        numbers = {self.kind: self.count, self.distractor: self.distractors}
        there = sorted((kind for kind in THINGS if numbers.get(kind)), key=lambda kind: -numbers[kind])
        return " and ".join(counted(numbers[kind], kind) for kind in there) or "nothing"

    @property
    def prompt(self) -> str:
        """The text between the picture and `target`."""
        match self.task:
            case SceneTask.question:
                return self.question
            case SceneTask.caption:
                return ""

    @property
    def target(self) -> str:
        """The text to predict from the picture and the prompt."""
        match self.task:
            case SceneTask.question:
                return self.answer
            case SceneTask.caption:
                return self.caption

    @cached_property
    def png(self) -> bytes:
        """The picture. Needs Pillow."""
        require("PIL")
        from PIL import Image

        picture = Image.new("RGB", (self.size, self.size), self.background)
        for thing in self.things:
            corner = (thing.x - thing.radius, thing.y - thing.radius)
            picture.paste(COLOURS[thing.colour], corner, shape(thing.kind, thing.radius, thing.turn))
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        return file.getvalue()


def scene(number: int, config: SceneConfig) -> Scene:
    """Return a scene that depends on `config` and `number` alone. Each count from 0 to 9 is equally likely."""
    draws = Draws("scene", config.seed, number)
    count, kinds = draws.below(MOST + 1), list(THINGS)
    kind = kinds.pop(draws.below(len(kinds)))
    colours = list(COLOURS)
    colour, other_colour = colours[draws.below(len(colours))], colours[draws.below(len(colours))]
    distractors, other = draws.below(config.distractors + 1), kinds[draws.below(len(kinds))]
    wanted = [(kind, colour)] * count + [(other, other_colour)] * distractors
    places = None
    while places is None:
        places = _places(len(wanted), config, draws)
    things = tuple(Thing(*what, *place, draws.below(_TURNS)) for what, place in zip(wanted, places, strict=True))
    background = draw_background(draws)
    distractor = other if distractors else None
    return Scene(config.size, kind, count, colour, distractor, distractors, background, things, config.task)


def draw_background(draws: Draws) -> tuple[int, int, int]:
    """Return the red, green and blue of a plain background, one of about 9,000."""
    red, green, blue = (draws.between(DARKEST, BRIGHTEST) for _ in range(3))
    return red, green, blue


def held_out(index: int) -> int:
    """Return the number of a scene that training never sees. Training uses the numbers from 0 on."""
    if index < 0:
        raise ValueError(f"the index of a held-out scene must not be negative, not {index}")
    return -1 - index


def counted(number: int, kind: str) -> str:
    """Return such as "no stars", "one star" or "four stars"."""
    return f"{NUMBERS[number]} {kind if number == 1 else THINGS[kind]}"


def _places(most: int, config: SceneConfig, draws: Draws) -> list[tuple[int, int, int]] | None:
    """Return x, y and radius of `most` circles with gaps between them, or None if they do not fit at random."""
    places: list[tuple[int, int, int]] = []
    for _ in range(most):
        for _ in range(_TRIES):
            radius = draws.between(*config.radii)
            x, y = (draws.between(radius + 1, config.size - radius - 2) for _ in range(2))
            if all((x - a) ** 2 + (y - b) ** 2 >= (radius + r + config.gap) ** 2 for a, b, r in places):
                places.append((x, y, radius))
                break
        else:
            return None
    return places


@cache
def shape(kind: str, radius: int, turn: int) -> Any:
    """Return the mask of a thing: drawn large and reduced, so that its edges are smooth."""
    from PIL import Image, ImageDraw

    scale = radius * _FINE
    mask = Image.new("L", (2 * scale, 2 * scale))
    draw = ImageDraw.Draw(mask)
    angle = turn * 2 * math.pi / _TURNS
    sine, cosine = math.sin(angle), math.cos(angle)

    def at(x: float, y: float) -> tuple[float, float]:
        return scale * (1 + x * cosine - y * sine), scale * (1 + x * sine + y * cosine)

    def disc(x: float, y: float, r: float, fill: int) -> None:
        (a, b), r = at(x, y), r * scale
        draw.ellipse((a - r, b - r, a + r, b + r), fill)

    match kind:
        case "ball":
            disc(0, 0, 0.85, 255)
        case "moon":
            disc(0, 0, 1, 255)
            disc(0.5, 0, 0.75, 0)
        case _:
            draw.polygon([at(x, y) for x, y in _outline(kind)], 255)
    return mask.reduce(_FINE)


def _outline(kind: str) -> list[tuple[float, float]]:
    """Return the corners of a thing that points to the right, in the unit circle."""
    match kind:
        case "pencil":
            return [(-0.96, -0.25), (0.5, -0.25), (1, 0), (0.5, 0.25), (-0.96, 0.25)]
        case "box":
            return [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)]
        case "star":
            tips = [(r, step * math.pi / 5) for step, r in enumerate((1, 0.42) * 5)]
            return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in tips]
        case "cross":
            arm = [(0.95, -0.28), (0.95, 0.28), (0.28, 0.28)]
            quarters = ((1, 0), (0, 1), (-1, 0), (0, -1))  # cosine and sine
            return [(x * cosine - y * sine, x * sine + y * cosine) for cosine, sine in quarters for x, y in arm]
        case _:
            raise ValueError(f"no such thing as a {kind}")
