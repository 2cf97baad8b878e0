"""Repeated pictures: copies in other sizes, qualities and with cut borders are found, and other pictures are not."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.filter.config import DuplicateConfig
from data.filter.input.records import Reason, RecordPicture
from data.filter.screen import pictures
from data.filter.screen.pictures import Copy, find_picture_duplicates
from data.images.generated.glyphs import GlyphConfig, glyph
from data.images.generated.scenes import SceneConfig, scene
from data.images.phash import COLOUR_BYTES, hash_and_colours

DISTANCE = DuplicateConfig().pictures


def opened(data: bytes) -> Any:
    return Image.open(io.BytesIO(data)).convert("RGB")


def jpeg(picture: Any, quality: int) -> Any:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return opened(file.getvalue())


def cut(picture: Any, share: float) -> Any:
    x, y = (max(1, round(side * share)) for side in picture.size)
    return picture.crop((x, y, picture.width - x, picture.height - y))


def not_empty(count: int) -> list[Any]:
    """Return the scenes with a thing in them: those without are plain, and repeat each other."""
    found = [opened(scene(number, SceneConfig()).png) for number in range(count)]
    return [picture for picture in found if len(picture.getcolors(2**16)) > 1]


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return not_empty(45)[:40]


def signed(documents: list[list[Any]], names: list[list[str]] | None = None) -> list[list[RecordPicture]]:
    """Return documents of pictures as those of records. `names` stand for the digests of their bytes."""
    names = names or [[f"{row}-{place}" for place in range(len(mine))] for row, mine in enumerate(documents)]
    return [
        [RecordPicture("", name, 1, 1, 1, 1, 1, *hash_and_colours(np.asarray(one))) for one, name in pairs]
        for pairs in (list(zip(*both, strict=True)) for both in zip(documents, names, strict=True))
    ]


def found(documents: list[list[Any]], names: list[list[str]] | None = None, distance: int = DISTANCE) -> list[Any]:
    return find_picture_duplicates(signed(documents, names), distance)


COPIES: dict[str, tuple[Callable[[Any], Any], float]] = {
    "half the size": (lambda picture: picture.resize((picture.width // 2, picture.height // 2)), 0.99),
    "twice the size": (lambda picture: picture.resize((picture.width * 2, picture.height * 2)), 0.98),
    "JPEG of quality 40": (lambda picture: jpeg(picture, 40), 0.55),
    "small JPEG": (lambda picture: jpeg(picture.resize((70, 60)), 75), 0.78),
    "1% cut at each border": (lambda picture: cut(picture, 0.01), 0.97),
    "2% cut at each border": (lambda picture: cut(picture, 0.02), 0.92),
}


def shares(originals: list[Any], change: Callable[[Any], Any]) -> tuple[float, int]:
    """Return the fraction of copies that are found, and the number of pictures taken for copies of others."""
    copies = found([[picture] for picture in originals] + [[change(picture)] for picture in originals])
    count = len(originals)
    right = [copy is not None and copy.of == row for row, copy in enumerate(copies[count:])]
    wrong = [copy is not None and copy.of != row % count for row, copy in enumerate(copies)]
    return float(np.mean(right)), sum(wrong)


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found(scenes, name):
    change, least = COPIES[name]
    share, wrong = shares(scenes, change)
    assert share >= least and wrong == 0


@pytest.mark.slow  # 20 s
def test_rates_on_scenes_and_glyphs():
    """The figures of the module's docstring. Without the colours, more pictures are taken for copies of others."""
    glyphs = [opened(glyph(number, GlyphConfig())[0]) for number in range(600)]
    originals = [*not_empty(650)[:600], *glyphs]
    for change, least in COPIES.values():
        share, wrong = shares(originals[::4], change)
        assert share >= least and wrong <= 2
    documents = signed([[picture] for picture in originals])
    by_hash = [[replace(one, colours=bytes(COLOUR_BYTES))] for (one,) in documents]
    copies, by_hash = (find_picture_duplicates(some, DISTANCE) for some in (documents, by_hash))
    assert sum(map(bool, copies)) <= 2 < sum(map(bool, by_hash))


def test_colours_tell_plain_pictures_apart():
    red, green, large = (
        Image.new("RGB", size, colour)
        for size, colour in (((8, 8), (200, 0, 0)), ((8, 8), (0, 200, 0)), ((60, 40), (200, 0, 0)))
    )
    assert found([[red], [green], [large]]) == [None, None, Copy(Reason.near_duplicate_pictures, 0)]


def test_colours_are_needed(monkeypatch):
    """The control."""
    monkeypatch.setattr(pictures, "_APART", 255)
    red, green = (Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0)))
    assert found([[red], [green]])[1] is not None


def test_a_document_is_dropped_if_all_its_pictures_are_known(scenes):
    a, b, c, d = scenes[:4]
    documents = [[a, b], [], [a], [c, a], [b, a], [c], [d, c], [jpeg(d, 60)]]
    names: list[list[str]] = [["a", "b"], [], ["a"], ["c", "a"], ["b", "a"], ["c"], ["d", "c"], ["e"]]
    same, near = Reason.duplicate_pictures, Reason.near_duplicate_pictures
    expected = [None, None, Copy(same, 0), None, Copy(same, 0), Copy(same, 3), None, Copy(near, 6)]
    assert found(documents, names) == expected
    assert found(documents, names, distance=0)[:7] == expected[:7]


def test_a_dropped_document_owns_no_picture(scenes):
    """A document that was omitted (0 pictures) or dropped is never named as the one that is kept."""
    a, b = scenes[:2]
    copies = found([[a], [a], [b], [b, a]])
    assert [copy and copy.of for copy in copies] == [None, 0, None, 2]


def test_nothing_to_compare():
    assert find_picture_duplicates([], DISTANCE) == [] and found([[], []]) == [None, None]
