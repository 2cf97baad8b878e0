"""Bad videos: each is one line with its name, the reason and what to do, quickly and without FFmpeg's own messages."""

from __future__ import annotations

import io
import time

import av
import numpy as np
import pytest

from core.errors import ConfigError
from data.images import video
from data.images.video import BadVideo, FrameConfig, frames
from tests.data.images.video.test_video import KINDS, TENTH, example
from tests.data.images.video.videos import MILLISECOND, pictures, written


def complaint(data: bytes, **settings) -> str:
    with pytest.raises(BadVideo) as caught:
        list(frames(data, "films/v.bin", FrameConfig(**settings)))
    line = str(caught.value)
    assert line.startswith("films/v.bin: ") and "; " in line and "\n" not in line
    return line.removeprefix("films/v.bin: ")


def sound(container: str = "matroska") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("pcm_s16le", 8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def without_frames() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", 10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        output.start_encoding()
    return file.getvalue()


NOT_READ = "is no mp4, mov, webm, mkv, avi or gif; convert it to one of them"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"<html><body>404</body></html>",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 1 RTP/AVP 96\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        b"RIFF\x24\0\0\0WAVEfmt ",
    ],
    ids=["empty", "zeros", "html", "hls", "concat", "sdp", "dash", "wave"],
)
def test_other_files_and_playlists_are_not_opened(data, monkeypatch):
    opened = []
    monkeypatch.setattr(av, "open", lambda *args, **words: opened.append(words["format"]))
    assert complaint(data) == NOT_READ
    assert opened == []


def test_only_four_demuxers_are_ever_used(monkeypatch):
    """A playlist behind the first bytes of a video is given to that video's demuxer."""
    used, usual, data = [], av.open, [example(kind) for kind in KINDS]
    monkeypatch.setattr(av, "open", lambda *args, **words: used.append(words["format"]) or usual(*args, **words))
    for one in data:
        list(frames(one, "v", FrameConfig()))
    assert set(used) == {"mov", "matroska", "avi", "gif"}
    assert "cannot be decoded" in complaint(b"\0\0\0\0ftyp#EXTM3U\nfile:///etc/passwd\n" + b"\0" * 99)


def test_a_video_cannot_make_us_open_a_file():
    with pytest.raises(OSError, match="refers to another file"):
        video._refuse("file:///etc/passwd", 1, {})


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_are_refused(kind):
    data = example(kind)
    list(frames(data, "v", FrameConfig()))  # control: the whole file is good
    cuts = {*range(1, 60, 7), *(len(data) * part // 12 for part in range(1, 12)), len(data) - 100, len(data) - 1}
    for cut in sorted(cuts):
        assert "\n" not in complaint(data[:cut]), cut


def test_truncation_would_else_be_silent(monkeypatch):
    """Control: FFmpeg alone gives half of a truncated Matroska file without an error."""
    data = example("mkv")
    monkeypatch.setattr(video, "_is_whole", lambda data, kind: True)
    assert len(list(frames(data[: len(data) // 2], "v", FrameConfig(fps=10)))) < 30


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_give_frames_or_one_line(kind, capfd):
    """Damage that the decoder does not report changes pixels; nothing else is raised, and nothing is printed."""
    data, random, found = example(kind), np.random.default_rng(1), 0
    for _ in range(40):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 4):
            broken[place] ^= int(random.integers(1, 256))
        try:
            seen = list(frames(bytes(broken), "v", FrameConfig()))
        except BadVideo as error:
            found += 1
            assert "\n" not in str(error)
        else:
            assert 0 < len(seen) <= 48
    assert found or kind == "gif"  # its decoder reports next to nothing
    assert capfd.readouterr().err == ""


def test_files_without_frames_are_refused():
    assert complaint(sound()) == "has no video stream; leave it out"
    assert complaint(without_frames()) == "has no frames; leave it out"


def test_rare_codecs_are_refused():
    data = written(pictures(3), range(3), "huffyuv", "avi", "rgb24", TENTH)
    assert complaint(data) == "is coded as huffyuv, which is not read; re-encode it as h264, vp9 or av1"


def test_time_stamps_out_of_order_are_refused():
    """An avi stores no presentation times, so frames that refer to later ones come back in the wrong order."""
    data = written(pictures(20), range(20), "libx264", "avi", "yuv420p", TENTH, g="8")
    assert complaint(data) == "has time stamps that are out of order; re-encode it as mp4 or webm"


def packets(**changes) -> list:
    class Packet:
        size, pts, is_keyframe, is_discard, is_corrupt = 1, 0, True, False, False

    found = []
    for number in range(3):
        packet = Packet()
        packet.pts = number
        found.append(packet)
    for key, value in changes.items():
        setattr(found[1], key, value)
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pts": None}, "frame 1 has no time stamp; re-encode it as mp4 or webm"),
        ({"pts": 2}, "has frames with the same time stamp; re-encode it as mp4 or webm"),
        ({"pts": 10**9}, "has time stamps more than 24 hours apart; re-encode it as mp4 or webm"),
        ({"is_corrupt": True}, "has a damaged packet; copy it again or leave it out"),
    ],
)
def test_broken_packets_are_refused(changes, message):
    class Stream:
        time_base = TENTH

        class codec_context:
            name = "ffv1"

    class Container:
        found: list

        def demux(self, stream):
            return iter(self.found)

    container = Container()
    container.found = packets()
    assert video._read_index(container, Stream, "v").shown == [0, 1, 2]  # control
    container.found = packets(**changes)
    with pytest.raises(BadVideo) as caught:
        video._read_index(container, Stream, "v")
    assert str(caught.value) == f"v: {message}"


def test_hidden_packets_of_vp8_and_cut_edits_give_no_frame():
    class Packet:
        size, pts, is_keyframe, is_discard, is_corrupt = 1, 0, False, False, False

        def __init__(self, pts: int, first: int, is_discard: bool = False) -> None:
            self.pts, self.first, self.is_discard = pts, first, is_discard

        def __bytes__(self) -> bytes:
            return bytes([self.first])

    class Container:
        def demux(self, stream):
            return iter([Packet(-1, 0x10, True), Packet(0, 0x10), Packet(1, 0x01), Packet(2, 0x11)])

    class Stream:
        time_base = MILLISECOND

        class codec_context:
            name = "vp8"

    index = video._read_index(Container(), Stream, "v")
    assert index.shown == [0, 2] and len(index.needed([0])) == 4


def test_large_frames_are_refused_before_decoding():
    data = example("mkv")
    assert complaint(data, largest_pixels=3071) == "has frames of more than 3,071 pixels, or of no size; scale it down"
    assert len(list(frames(data, "v", FrameConfig(largest_pixels=3072)))) == 8  # control


def growing() -> bytes:
    """Return a video with five frames of 64 x 48 and then five of 640 x 480."""
    file = io.BytesIO()
    parts = [
        written(pictures(5, *size), range(5), "mjpeg", "avi", "yuvj420p", TENTH) for size in ((64, 48), (640, 480))
    ]
    with av.open(file, "w", format="avi") as output:
        stream, number = None, 0
        for part in parts:
            with av.open(io.BytesIO(part)) as container:
                stream = stream or output.add_stream_from_template(container.streams.video[0])
                for packet in container.demux(container.streams.video[0]):
                    if packet.size:
                        packet.pts = packet.dts = number
                        packet.stream, number = stream, number + 1
                        output.mux(packet)
    return file.getvalue()


def test_frames_that_grow_in_the_stream_are_refused():
    """The decoder itself has the limit, and the work is counted as it is done."""
    data = growing()
    assert [frame.picture.size for frame in frames(data, "v", FrameConfig(fps=10))][4:6] == [(64, 48), (640, 480)]
    assert "cannot be decoded" in complaint(data, fps=10, largest_pixels=64 * 48)
    assert "pixels decoded" in complaint(data, fps=10, most_decoded_pixels=5 * 64 * 48 + 4 * 640 * 480)


def test_a_gif_of_four_gigapixels_is_refused_at_once():
    data = bytearray(example("gif"))
    data[6:10] = b"\xff\xff\xff\xff"
    start = time.monotonic()
    assert complaint(bytes(data))
    assert time.monotonic() - start < 2


def test_work_is_limited():
    data = example("mp4", 80)
    wanted = "needs more than 245,759 pixels decoded; cut it into shorter clips"
    assert complaint(data, most_decoded_pixels=245_759) == wanted
    assert len(list(frames(data, "v", FrameConfig(most_decoded_pixels=245_760)))) == 16  # control


def test_the_number_of_packets_is_limited(monkeypatch):
    monkeypatch.setattr(video, "MOST_PACKETS", 30)
    assert complaint(example("mkv")) == "has more than 30 frames; cut it into shorter clips"


def test_a_missing_frame_is_named(monkeypatch):
    monkeypatch.setattr(video._PacketIndex, "chosen", lambda self, config: [0, 555])
    assert complaint(example("mkv")) == "the frame at 0:00.6 cannot be decoded; re-encode it or leave it out"


@pytest.mark.parametrize("key", ["fps", "most", "largest_pixels", "most_decoded_pixels"])
def test_settings_must_be_positive(key):
    with pytest.raises(ConfigError, match=rf"^{key}=0: must be positive$"):
        FrameConfig(**{key: 0})


@pytest.mark.parametrize(
    ("module", "message"),
    [("av", r"videos need PyAV: .*\[video\]"), ("PIL", r"pictures need Pillow: .*\[vision\]")],
)
def test_a_missing_package_is_one_line(module, message, monkeypatch):
    data = example("mkv")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=message):
        list(frames(data, "v", FrameConfig()))
