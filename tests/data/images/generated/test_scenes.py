"""Counted scenes: pure functions of a number, uniform counts, things apart, and pictures that show the count."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from PIL import Image

from core.errors import ConfigError
from data.images.generated import scenes
from data.images.generated.scenes import SceneConfig, SceneTask, counted, held_out, scene
from tests.data.images.pixels import components

MIXED = SceneConfig(distractors=3)
KNOWN = ("pencil", 8, None, 0, 51, 56, 9, 14)
"""Values of scene 0: kind, count, distractor, distractors, then x, y, radius and direction of its first thing."""


def pixels(one) -> np.ndarray:
    picture = Image.open(io.BytesIO(one.png))
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    return np.asarray(picture).astype(int)


def things_seen(one) -> int:
    return components(abs(pixels(one) - one.background).max(axis=2) > 8)


def overlaps(things, gap: int) -> bool:
    return any(math.dist((a.x, a.y), (b.x, b.y)) < a.radius + b.radius + gap for a, b in combinations(things, 2))


def test_a_scene_is_a_function_of_seed_and_number():
    for number in (0, 1, 10**12, -5):
        assert scene(number, MIXED) == scene(number, MIXED)
        assert scene(number, MIXED).png == scene(number, MIXED).png
    assert scene(3, SceneConfig(seed=1)) != scene(3, SceneConfig(seed=2))
    busy = [one for one in map(lambda n: scene(n, MIXED), range(300)) if one.things]
    assert len({one.png for one in busy}) == len(busy) > 250


def test_layouts_are_the_same_on_every_machine():
    """Numbers come from a hash and from whole numbers, so these values must never change."""
    one = scene(0, MIXED)
    first = one.things[0]
    assert (one.kind, one.count, one.distractor, one.distractors) == KNOWN[:4]
    assert (first.x, first.y, first.radius, first.turn) == KNOWN[4:]


def test_counts_kinds_and_colours_are_equally_likely():
    many = [scene(number, MIXED) for number in range(5000)]
    for wanted, values in (
        (range(10), [one.count for one in many]),
        (scenes.THINGS, [one.kind for one in many]),
        (scenes.COLOURS, [one.colour for one in many]),
        (range(4), [one.distractors for one in many]),
    ):
        seen, expected = Counter(values), 5000 / len(wanted)
        assert set(seen) == set(wanted)
        assert all(abs(number - expected) < 5 * math.sqrt(expected) for number in seen.values())


def test_radii_tell_nothing_of_the_count():
    many = [scene(number, SceneConfig()) for number in range(4000)]
    few, most = ([t.radius for one in many if one.count in (n, n + 1) for t in one.things] for n in (2, 8))
    assert abs(np.mean(few) - np.mean(most)) < 0.2


@pytest.mark.parametrize("config", [SceneConfig(), MIXED, SceneConfig(size=84, distractors=9)])
def test_things_are_apart_and_inside(config):
    for number in range(200):
        one = scene(number, config)
        assert not overlaps(one.things, config.gap)
        for thing in one.things:
            assert thing.radius < min(thing.x, thing.y)
            assert max(thing.x, thing.y) + thing.radius < config.size


def test_overlap_check_sees_things_that_touch():
    """Control: a thing moved onto its neighbour is found."""
    one = next(one for one in map(lambda n: scene(n, MIXED), range(50)) if len(one.things) > 1)
    near = replace(one.things[0], x=one.things[1].x + 3, y=one.things[1].y)
    assert overlaps((near, *one.things[1:]), MIXED.gap)


@pytest.mark.parametrize("config", [SceneConfig(), MIXED, SceneConfig(size=84, distractors=9)])
def test_the_picture_shows_the_count(config):
    for number in range(100):
        one = scene(number, config)
        assert things_seen(one) == one.count + one.distractors, f"scene {number}"


def test_counting_tells_scenes_apart():
    """Control: the same scene with a thing less, and another scene's picture, do not show the count."""
    many = [scene(number, SceneConfig()) for number in range(100)]
    for one in many:
        assert not one.things or things_seen(replace(one, things=one.things[1:])) == one.count - 1
    shifted = sum(things_seen(other) == one.count for one, other in pairwise(many))
    assert shifted < 25


@pytest.mark.parametrize("kind", scenes.THINGS)
def test_kinds_look_different(kind):
    """Each kind covers its own share of its circle, at any radius and direction, within what reducing costs."""
    shares = {
        name: [np.asarray(scenes.shape(name, radius, turn)).mean() / 255 for radius in (7, 10) for turn in range(16)]
        for name in scenes.THINGS
    }
    assert max(shares[kind]) - min(shares[kind]) < 0.03
    assert all(abs(np.mean(shares[kind]) - np.mean(other)) > 0.02 for name, other in shares.items() if name != kind)


def test_held_out_scenes_are_no_training_scenes():
    assert [held_out(index) for index in range(3)] == [-1, -2, -3]
    with pytest.raises(ValueError, match="must not be negative"):
        held_out(-1)
    training = {scene(number, SceneConfig()).things for number in range(2000)} - {()}
    unseen = [scene(held_out(index), SceneConfig()).things for index in range(500)]
    assert not training & set(unseen)
    assert training & {scene(7, SceneConfig()).things}  # control


def test_questions_and_captions_follow_from_the_picture():
    for number in range(300):
        one = scene(number, MIXED)
        assert one.question == f"How many {scenes.THINGS[one.kind]}?" and one.answer == str(one.count)
        seen = Counter(thing.kind for thing in one.things)
        largest_first = sorted(scenes.THINGS, key=lambda kind: seen[kind], reverse=True)
        named = [counted(seen[kind], kind) for kind in largest_first if seen[kind]]
        assert one.caption == (" and ".join(named) or "nothing")
        assert one.distractor != one.kind and bool(one.distractor) == bool(one.distractors)


def test_the_task_chooses_prompt_and_target():
    question, caption = (scene(26, replace(MIXED, task=task)) for task in SceneTask)
    assert (question.prompt, question.target) == ("How many moons?", "4")
    assert (caption.prompt, caption.target) == ("", "four moons and three boxes")
    assert question.png == caption.png


@pytest.mark.parametrize(
    ("number", "kind", "text"), [(0, "box", "no boxes"), (1, "cross", "one cross"), (9, "moon", "nine moons")]
)
def test_numbers_are_spelled(number, kind, text):
    assert counted(number, kind) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 60}, "size=60: must be from 84 to 1024 pixels, so that things can be told apart"),
        ({"distractors": 10}, "distractors=10: must be from 0 to 9"),
        ({"distractors": -1}, "distractors=-1: must be from 0 to 9"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError) as caught:
        SceneConfig(**change)
    assert str(caught.value) == message


def test_missing_pillow_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"^pictures need Pillow: pip install 'leviathan\[vision\]'$"):
        _ = scene(1, SceneConfig()).png
