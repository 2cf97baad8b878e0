"""Sources of generated documents, named by import path: `kind=data.images.generated.sources:Scenes`."""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version

from core.errors import ConfigError, check_numbers
from core.files import sha256_text
from data.images.generated import clips, draws, glyphs, scenes
from data.images.parts import ImagePart, PartsDocument, VideoPart


class Scenes:
    """`number` counted scenes: a picture, then question and answer, or a caption. Options: those of `SceneConfig`."""

    def __init__(self, number: int = 4096, task: str = "question", **options: int) -> None:
        self.number = number
        check_numbers(self, positive=("number",))
        if task not in scenes.SceneTask.__members__:
            raise ConfigError("task", task, "no such task", list(scenes.SceneTask.__members__))
        self.config = scenes.SceneConfig(task=scenes.SceneTask[task], **options)

    def fingerprint(self) -> str:
        source = inspect.getsource(scenes) + inspect.getsource(draws)
        return sha256_text("scenes", source, str(self.number), str(self.config))

    def documents(self) -> Iterator[PartsDocument]:
        for number in range(self.number):
            scene = scenes.scene(number, self.config)
            text = f"{scene.prompt} {scene.target}".strip()
            yield PartsDocument(f"scene {number}", (ImagePart(scene.png, f"scene {number}"), text))


class Clips:
    """`number` clips of a ball: a video, the question how often it bounces, and the answer."""

    def __init__(self, number: int = 256, **options: int) -> None:
        self.number, self.config = number, clips.ClipConfig(**options)
        check_numbers(self, positive=("number",))

    def fingerprint(self) -> str:
        source = "".join(map(inspect.getsource, (clips, scenes, draws)))
        return sha256_text("clips", source, str(self.number), str(asdict(self.config)))

    def documents(self) -> Iterator[PartsDocument]:
        for number in range(self.number):
            clip = clips.clip(number, self.config)
            text = f"{clip.question} {clip.answer}"
            yield PartsDocument(f"clip {number}", (VideoPart(clip.data, f"clip {number}"), text))


class Glyphs:
    """`number` characters of fonts: a picture, then the character's Unicode name. Options: those of `GlyphConfig`."""

    def __init__(self, number: int = 4096, **options: int) -> None:
        self.number, self.config = number, glyphs.GlyphConfig(**options)
        check_numbers(self, positive=("number",))

    def fingerprint(self) -> str:
        source = "".join(map(inspect.getsource, (glyphs, scenes, draws)))
        versions = (version("matplotlib"), version("pillow"), unicodedata.unidata_version)  # fonts, pixels, names
        return sha256_text("glyphs", source, *versions, str(self.number), str(asdict(self.config)))

    def documents(self) -> Iterator[PartsDocument]:
        for number in range(self.number):
            png, name = glyphs.glyph(number, self.config)
            yield PartsDocument(f"glyph {number}", (ImagePart(png, f"glyph {number}"), name))
