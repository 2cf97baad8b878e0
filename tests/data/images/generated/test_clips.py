"""Clips: pure functions of a number whose bounces can be counted from the decoded frames."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from core.errors import ConfigError
from data.images.generated import clips
from data.images.generated.clips import ClipConfig, clip
from data.images.generated.scenes import held_out
from data.images.video import FrameConfig, frames

CONFIG = ClipConfig()
KNOWN = (0, "blue", (28, 46), (9, 23))
"""Bounces, colour, first and last place of clip 0."""


def centres(data: bytes) -> np.ndarray:
    """Return the centre of what differs from the corner's colour in each frame, [frames, 2]."""
    found = []
    for frame in frames(data, "clip", FrameConfig()):
        pixels = np.asarray(frame.picture).astype(int)
        weight = abs(pixels - pixels[0, 0]).sum(axis=2)
        assert weight.any(), "a frame without a ball"
        grid = np.mgrid[: len(pixels), : len(pixels)]
        found.append((grid * weight).sum(axis=(1, 2)) / weight.sum())
    return np.array(found)[:, ::-1]


def turns(places: np.ndarray) -> int:
    """Return how often the direction along an axis changes. A still step has no direction."""
    found = 0
    for along in places.T:
        moves = np.sign(np.round(np.diff(along), 1))
        moves = moves[moves != 0]
        found += int((moves[1:] != moves[:-1]).sum())
    return found


def test_a_clip_is_a_function_of_seed_and_number():
    for number in (0, 5, -1):
        assert clip(number, CONFIG) == clip(number, CONFIG)
        assert clip(number, CONFIG).data == clip(number, CONFIG).data
    assert clip(1, CONFIG).data != clip(2, CONFIG).data
    assert clip(1, CONFIG) != clip(1, replace(CONFIG, seed=1))


def test_paths_are_the_same_on_every_machine():
    """They come from a hash and from whole numbers, so these values must never change."""
    one = clip(0, CONFIG)
    assert (one.bounces, one.colour, one.path[0], one.path[-1]) == KNOWN


def test_numbers_of_bounces_are_equally_likely():
    seen = Counter(clip(number, CONFIG).bounces for number in range(1200))
    assert set(seen) == set(range(6)) and all(abs(count - 200) < 5 * 200**0.5 for count in seen.values())


def test_held_out_clips_are_no_training_clips():
    training = {clip(number, CONFIG).path for number in range(1000)}
    assert not training & {clip(held_out(index), CONFIG).path for index in range(300)}


def test_the_frames_show_the_bounces():
    for number in range(40):
        one = clip(number, CONFIG)
        seen = centres(one.data)
        assert turns(seen) == one.bounces == int(one.answer), f"clip {number}"
        assert abs(seen - (np.array(one.path) - 0.5)).max() < 0.3


def test_counting_turns_notices_missing_frames():
    """Control: without the frames after a clip's middle, or in another order, the turns are not the bounces."""
    many = [clip(number, CONFIG) for number in range(60)]
    cut = [turns(np.array(one.path[:8])) != one.bounces for one in many if one.bounces > 2]
    mixed = [turns(np.array(one.path[::2] + one.path[1::2])) != one.bounces for one in many]
    assert np.mean(cut) > 0.9 and np.mean(mixed) > 0.8


@pytest.mark.parametrize("config", [CONFIG, ClipConfig(size=32), ClipConfig(size=100, frames=48)])
def test_each_turn_can_be_seen_in_the_path(config):
    for number in range(300):
        one = clip(number, config)
        assert turns(np.array(one.path)) == one.bounces == len(set(one.steps))
        inside = np.array(one.path)
        assert inside.min() >= config.radius and inside.max() <= config.size - config.radius


def test_the_ball_is_at_a_wall_when_it_bounces():
    """Half a step away from it at most, before or after."""
    for number in range(300):
        one = clip(number, CONFIG)
        path = np.array(one.path)
        for step in one.steps:
            near = path[step : step + 2]
            reach = abs(np.diff(path, axis=0)).max() / 2 + 1
            assert min(near.min() - CONFIG.radius, CONFIG.size - CONFIG.radius - near.max()) <= reach


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 8}, "size=8: must be from 32 to 1024 pixels"),
        ({"frames": 4}, "frames=4: must be from 16 to 1000, so that each bounce can be seen"),
        ({"fps": 0}, "fps=0: must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError) as caught:
        ClipConfig(**change)
    assert str(caught.value) == message


def test_missing_pyav_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"^videos need PyAV: pip install 'leviathan\[video\]'$"):
        _ = clips.clip(1, CONFIG).data
