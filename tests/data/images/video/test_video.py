"""Frames of a video: exact pixels, chosen by time, bounded, and one line for each bad file."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from data.images import video
from data.images.video import BadVideo, FrameConfig, frames, time_text
from tests.data.images.video.videos import all_frames, pictures, written

TENTH = Fraction(1, 10)
OPEN = "open-gop=1:keyint=8:min-keyint=4:bframes=3:b-adapt=0:scenecut=0"
"""Frames before a group's first picture refer to the group before."""
KINDS = {
    "mkv": {},
    "mp4": {"codec": "libx264", "container": "mp4", "pixels": "yuv420p", "g": "8", "bf": "2"},
    "open": {"codec": "libx264", "container": "mp4", "pixels": "yuv420p", "x264-params": OPEN},
    "hevc": {"codec": "libx265", "container": "mp4", "pixels": "yuv420p", "x265-params": "log-level=none:keyint=8"},
    "mov": {"codec": "mjpeg", "container": "mov", "pixels": "yuvj420p"},
    "webm": {"codec": "libvpx-vp9", "container": "webm", "pixels": "yuv420p", "g": "8"},
    "vp8": {"codec": "libvpx", "container": "webm", "pixels": "yuv420p", "g": "20", "lag-in-frames": "16"},
    "avi": {"codec": "mpeg4", "container": "avi", "pixels": "yuv420p"},
    "gif": {"codec": "gif", "container": "gif", "pixels": "rgb8"},
}


def example(kind: str, count: int = 40) -> bytes:
    """Return a video of 10 frames a second."""
    return written(pictures(count), range(count), unit=TENTH, **KINDS[kind])


def seconds(data: bytes, **settings) -> list[float]:
    found = list(frames(data, "v", FrameConfig(**settings)))
    return [frame.seconds for frame in found]


def test_lossless_frames_come_back_exactly():
    shown = pictures(20)
    found = list(frames(written(shown, range(5000, 15000, 500)), "v", FrameConfig()))
    assert [frame.seconds for frame in found] == [n / 2 for n in range(20)]
    assert all(np.array_equal(np.asarray(frame.picture), picture) for frame, picture in zip(found, shown, strict=True))
    assert not np.array_equal(np.asarray(found[1].picture), shown[0])  # control


def test_frames_are_sampled_by_time_and_not_by_index():
    """Ten frames in the first second, then one a second. Control: equal steps of the index give other pictures."""
    shown, stamps = pictures(14), [*range(0, 1000, 100), 1000, 2000, 3000, 4000]
    found = list(frames(written(shown, stamps), "v", FrameConfig(fps=1)))
    by_index = np.linspace(0, 13, 5).astype(int)
    assert [frame.seconds for frame in found] == [0, 1, 2, 3, 4]
    for frame, number in zip(found, (0, 10, 11, 12, 13), strict=True):
        assert np.array_equal(np.asarray(frame.picture), shown[number])
    assert [stamps[number] / 1000 for number in by_index] != [frame.seconds for frame in found]


def test_the_frame_on_the_screen_is_taken():
    """At 0.5 s the frame of 0.4 s is shown; it is not taken again at 1 s and 1.5 s, when it still is."""
    data = written(pictures(4), [0, 400, 1600, 2100])
    assert seconds(data) == [0, 0.4, 1.6]
    assert seconds(data, fps=10) == [0, 0.4, 1.6, 2.1]


@pytest.mark.parametrize("count", [1, 2, 48, 49, 100])
def test_at_most_so_many_frames_spread_over_the_time(count):
    shown = pictures(count, 16, 16)
    times = seconds(written(shown, [n * 500 for n in range(count)]))
    assert len(times) == min(count, 48) and times[0] == 0 and times[-1] == (count - 1) / 2
    steps = np.diff(times)
    assert count < 49 or steps.max() - steps.min() <= 0.5


def test_one_frame_at_most_is_the_first():
    assert seconds(example("mkv"), most=1) == [0]
    assert seconds(example("mkv"), most=2) == [0, 3.9]


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_what_decoding_all_gives(kind):
    """Groups of pictures without a chosen frame are skipped, and the pixels are the same as if they were not."""
    data = example(kind)
    whole = all_frames(data)
    for settings in ({}, {"fps": 10}, {"fps": 0.7}, {"most": 3}):
        found = list(frames(data, "v", FrameConfig(**settings)))
        assert seconds(data, **settings) == [frame.seconds for frame in found]
        for frame in found:
            assert np.array_equal(np.asarray(frame.picture), whole[frame.seconds]), frame.seconds
    assert seconds(data) == pytest.approx([n / 2 for n in range(8)])


def test_groups_without_a_chosen_frame_are_not_decoded(monkeypatch):
    decoded = []
    usual = video._decoded
    monkeypatch.setattr(video, "_decoded", lambda *args: (decoded.append(one.pts) or one for one in usual(*args)))
    data = example("mp4", 80)
    found = list(frames(data, "v", FrameConfig(most=2)))
    assert [frame.seconds for frame in found] == [0, 7.9] and len(decoded) < 20
    decoded.clear()
    list(frames(data, "v", FrameConfig(fps=10, most=80)))
    assert len(decoded) == 80  # control


def test_skipping_the_group_before_would_change_pixels(monkeypatch):
    """Control of open groups: decoding a frame's own group alone loses or changes those shown before its first picture."""
    data = example("open")
    whole = all_frames(data)

    def own_group(self, chosen):
        groups = np.cumsum(self.keys)
        used = {group for group, stamp in zip(groups, self.stamps, strict=True) if stamp in chosen}
        return [group in used for group in groups]

    def is_right(number: int) -> bool:
        monkeypatch.setattr(video._PacketIndex, "chosen", lambda self, config: self.shown[number : number + 1])
        try:
            return np.array_equal(np.asarray(next(frames(data, "v", FrameConfig())).picture), whole[number / 10])
        except BadVideo:
            return False

    assert all(is_right(number) for number in range(40))
    monkeypatch.setattr(video._PacketIndex, "needed", own_group)
    assert not all(is_right(number) for number in range(40))


def test_a_turned_video_is_turned_back():
    shown = pictures(5)
    plain, turned = (
        next(frames(written(shown, range(5), unit=TENTH, turn=turn, **KINDS["mp4"]), "v", FrameConfig(most=1))).picture
        for turn in (0, 90)
    )
    assert plain.size == (64, 48) and turned.size == (48, 64)
    assert np.array_equal(np.rot90(np.asarray(plain)), np.asarray(turned))


def test_time_texts_have_a_fixed_format():
    for time, text in {0: "0:00.0 ", 3.5: "0:03.5 ", 59.96: "1:00.0 ", 605.04: "10:05.0 ", 7200: "120:00.0 "}.items():
        assert time_text(time) == text
