"""Generate clips of a ball that crosses a frame and bounces off its walls 0 to 5 times, with a question and answer.

A clip is a pure function of (seed, number). Its path is computed with whole numbers and is the same on every machine;
the bytes of the file may differ between versions of FFmpeg. The codec is ffv1, which is lossless. Training uses the
numbers from 0 on and held-out clips the negative ones (`scenes.held_out`).

The bounces can be counted from the frames alone: the ball moves a quarter of the frame, and at least one whole step,
before and after each bounce of an axis, and never bounces off two walls in the same step.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from core.errors import ConfigError, check_numbers
from data.images.generated.draws import Draws
from data.images.generated.scenes import COLOURS, draw_background, shape
from data.images.packages import require

MOST_BOUNCES = 5


@dataclass(frozen=True)
class ClipConfig:
    seed: int = 0
    size: int = 64
    """Width and height of a frame in pixels."""
    frames: int = 16
    fps: int = 2
    """Frames per second of the clip. The default is the rate at which `FrameConfig` samples, so no frame is lost."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("fps",))
        if not 32 <= self.size <= 1024:
            raise ConfigError("size", self.size, "must be from 32 to 1024 pixels")
        if not 16 <= self.frames <= 1000:
            raise ConfigError("frames", self.frames, "must be from 16 to 1000, so that each bounce can be seen")

    @property
    def radius(self) -> int:
        """Radius of the ball in pixels."""
        return self.size // 10


@dataclass(frozen=True)
class Clip:
    """`path`: the ball's centre in each frame, in pixels. `steps`: when it bounces; step 0 leads from frame 0 to 1."""

    config: ClipConfig
    bounces: int
    colour: str
    background: tuple[int, int, int]
    path: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]

    @property
    def question(self) -> str:
        return "How many times does the ball bounce?"

    @property
    def answer(self) -> str:
        return str(self.bounces)

    @cached_property
    def data(self) -> bytes:
        """The video: ffv1 in Matroska. Needs PyAV and Pillow."""
        require("av")
        require("PIL")
        import av
        from PIL import Image

        size, radius, file = self.config.size, self.config.radius, io.BytesIO()
        with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("ffv1", self.config.fps)
            stream.width, stream.height, stream.pix_fmt = size, size, "bgr0"
            context = stream.codec_context
            context.thread_count, context.time_base = 1, Fraction(1, self.config.fps)
            context.flags |= av.codec.context.Flags.bitexact
            for number, (x, y) in enumerate(self.path):
                picture = Image.new("RGB", (size, size), self.background)
                picture.paste(COLOURS[self.colour], (x - radius, y - radius), shape("ball", radius, 0))
                frame = av.VideoFrame.from_image(picture)
                frame.pts, frame.time_base = number, context.time_base
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return file.getvalue()


def clip(number: int, config: ClipConfig) -> Clip:
    """Return a clip that depends on `config` and `number` alone. Each number of bounces is equally likely."""
    draws = Draws("clip", config.seed, number)
    bounces = draws.below(MOST_BOUNCES + 1)
    side = draws.below(bounces + 1)
    walls = (side, bounces - side)
    colour = list(COLOURS)[draws.below(len(COLOURS))]
    while True:
        x, y = (_Axis.draw(count, config, draws) for count in walls)
        steps = tuple(sorted(x.steps + y.steps))
        if len(set(steps)) == bounces:
            break
    path = tuple((x.at(frame), y.at(frame)) for frame in range(config.frames))
    return Clip(config, bounces, colour, draw_background(draws), path, steps)


@dataclass(frozen=True)
class _Axis:
    """Motion along one axis at a constant speed. Unfolded at the walls, the ball goes from `start` to `end` pixels."""

    start: int
    end: int
    mirrored: bool
    bounces: int
    config: ClipConfig

    @classmethod
    def draw(cls, bounces: int, config: ClipConfig, draws: Draws) -> _Axis:
        """Draw a motion in which each turn can be seen: it goes a quarter of the frame before the first bounce and
        after the last one, and a whole step at least.
        """
        length = config.size - 2 * config.radius
        while True:
            start, end = draws.between(1, length - 1), draws.between(1, length - 1)
            axis = cls(start, end, bool(draws.below(2)), bounces, config)
            if bounces:
                is_clear = min(length - start, end) >= length // 4
                is_clear = is_clear and axis.steps[0] >= 1 and axis.steps[-1] <= config.frames - 3
            else:
                is_clear = abs(end - start) >= length // 4
            if is_clear:
                return axis

    @property
    def length(self) -> int:
        """Distance that the centre can go between two walls."""
        return self.config.size - 2 * self.config.radius

    @property
    def way(self) -> int:
        """Distance from the first to the last frame, with all bounces unfolded."""
        return self.bounces * self.length + self.end - self.start

    @property
    def steps(self) -> list[int]:
        """Return the steps in which the ball bounces."""
        last = self.config.frames - 1
        return [(wall * self.length - self.start) * last // self.way for wall in range(1, self.bounces + 1)]

    def at(self, frame: int) -> int:
        """Return the centre in a frame, in pixels."""
        last = self.config.frames - 1
        place = (self.start * last + self.way * frame) % (2 * self.length * last)
        folded = min(place, 2 * self.length * last - place) // last
        return self.config.radius + (self.length - folded if self.mirrored else folded)
