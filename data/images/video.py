"""Decode some frames of a video, chosen by their presentation time stamps.

A first pass reads the packets without decoding them, and chooses frames by time: the frame that is on the screen at
0, 1 / fps, 2 / fps, ... seconds after the first one. A frame index would be wrong where the rate varies. A second pass
decodes the groups of pictures with a chosen frame, and skips the others.

The file is bytes in memory. The demuxer is chosen from the first bytes and is one of four, so that no playlist is read
and nothing is opened by path or URL. Audio is ignored, pixels are taken as square, and transparency is dropped.
Decoded pixels depend on FFmpeg's version, which PyAV's wheels contain. Files that are cut off or cannot be decoded are
refused; a changed byte that the decoder does not report changes pixels, as in a JPEG. Only a digest shows it.
"""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from core.errors import OneLineError, check_numbers, first_line
from data.images.packages import require

CODECS = (
    "av1", "ffv1", "gif", "h264", "hevc", "libdav1d", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "png", "prores",
    "theora", "vp8", "vp9",
)  # fmt: skip
"""Decoders that may run. FFmpeg has hundreds, and the rare ones are where its security holes are."""
MOST_PACKETS = 1_000_000
LONGEST_S = 24 * 3600
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


class BadVideo(OneLineError):
    """A video has no frames, is damaged or is beyond a limit. The message is one line with its name and what to do."""

    def __init__(self, name: str, reason: str, advice: str) -> None:
        super().__init__(f"{name}: {reason}; {advice}")


@dataclass(frozen=True)
class FrameConfig:
    """Which frames of a video are read."""

    fps: float = 2.0
    """Frames per second of the video's time. A video with fewer gives each frame once."""
    most: int = 48
    """Most frames of a video. From a longer one they are taken at equal distances, the first and last included."""
    largest_pixels: int = 10_000_000
    """Most pixels of a frame, checked before decoding."""
    most_decoded_pixels: int = 20_000_000_000
    """Most pixels decoded from a video in all, chosen or not: about a minute of work."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("fps", "most", "largest_pixels", "most_decoded_pixels"))


@dataclass(frozen=True)
class Frame:
    """`seconds` counts from the first frame. `picture` is a PIL image in RGB, turned as the video says."""

    seconds: float
    picture: Any


def frames(data: bytes, name: str, config: FrameConfig) -> Iterator[Frame]:
    """Yield the chosen frames in order, so that one picture at a time is in memory. `name` is for messages. Raises
    `BadVideo`, and `ConfigError` without PyAV.
    """
    index = _index_of(data, name, config)
    yield from _pictures(data, name, config, index, index.chosen(config))


def time_text(seconds: float) -> str:
    """Return the text that stands before a frame: minutes, seconds in two digits, tenths and a space ("0:03.5 ").

    Minutes go on above 59. Rounds to the nearest tenth, so frames that are closer may have the same text.
    """
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10} "


@dataclass(frozen=True)
class _PacketIndex:
    """What the packets of a stream say without being decoded, in the order of the file."""

    stamps: tuple[int, ...]
    keys: tuple[bool, ...]
    """Which packets start a group of pictures."""
    visible: tuple[bool, ...]
    """Which packets give a frame that is shown. The others are decoded because frames refer to them."""
    unit: Fraction
    """Seconds per unit of a time stamp."""

    @cached_property
    def shown(self) -> list[int]:
        return sorted(stamp for stamp, visible in zip(self.stamps, self.visible, strict=True) if visible)

    def seconds(self, stamp: int) -> float:
        return float((stamp - self.shown[0]) * self.unit)

    def chosen(self, config: FrameConfig) -> list[int]:
        """Return the time stamps of the frames that are on the screen at the sampled times, each once."""
        first, last = self.shown[0], self.shown[-1]
        length, fps = (last - first) * self.unit, Fraction(config.fps)
        count = math.floor(length * fps) + 1
        step = 1 / fps if count <= config.most else length / max(1, config.most - 1)
        times = (first + number * step / self.unit for number in range(min(count, config.most)))
        return list(dict.fromkeys(self.shown[bisect_right(self.shown, time) - 1] for time in times))

    def needed(self, chosen: list[int]) -> list[bool]:
        """Return which packets to decode: those of each group with a chosen frame, and of the group before it if the
        frame is shown before the group's first picture, since it may refer to both.
        """
        wanted, used, groups, group, start = set(chosen), set(), [], 0, self.stamps[0]
        for stamp, key, visible in zip(self.stamps, self.keys, self.visible, strict=True):
            if key:
                group, start = group + 1, stamp
            groups.append(group)
            if visible and stamp in wanted:
                used |= {group - 1, group} if stamp < start else {group}
        return [one in used for one in groups]


@contextmanager
def _opened(data: bytes, name: str, config: FrameConfig) -> Iterator[tuple[Any, Any]]:
    """Open a video. FFmpeg's errors in the block become `BadVideo`."""
    require("av")
    require("PIL")
    import av

    kind = _container(data)
    if kind is None:
        raise BadVideo(name, "is no mp4, mov, webm, mkv, avi or gif", "convert it to one of them")
    limit = {"max_pixels": str(config.largest_pixels)}
    try:
        if not _is_whole(data, kind):
            raise BadVideo(name, "ends too early", "copy it again or leave it out")
        with av.open(
            io.BytesIO(data), format=kind, options=limit, io_open=_refuse, metadata_errors="replace"
        ) as container:
            if not container.streams.video:
                raise BadVideo(name, "has no video stream", "leave it out")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None or context.name not in CODECS:
                reason = f"is coded as {getattr(context, 'name', 'something unknown')}, which is not read"
                raise BadVideo(name, reason, "re-encode it as h264, vp9 or av1")
            if not 0 < context.width * context.height <= config.largest_pixels:
                reason = f"has frames of more than {config.largest_pixels:,} pixels, or of no size"
                raise BadVideo(name, reason, "scale it down")
            context.options, context.thread_count = limit, 1
            yield container, stream
    except av.error.EOFError:
        raise BadVideo(name, "has no frames", "leave it out") from None
    except (av.FFmpegError, OSError, ValueError, ArithmeticError) as error:
        reason = f"cannot be decoded ({getattr(error, 'strerror', None) or first_line(error)})"
        raise BadVideo(name, reason, "re-encode it or leave it out") from None


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    """Refuse to open a file that a video refers to."""
    raise OSError("refers to another file")


def _packets(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """Yield the packets of a stream that give a frame each."""
    for number, packet in enumerate(container.demux(stream)):
        if number > MOST_PACKETS:
            raise BadVideo(name, f"has more than {MOST_PACKETS:,} frames", "cut it into shorter clips")
        if packet.is_corrupt:
            raise BadVideo(name, "has a damaged packet", "copy it again or leave it out")
        if packet.size:
            yield packet


def _index_of(data: bytes, name: str, config: FrameConfig) -> _PacketIndex:
    with _opened(data, name, config) as (container, stream):
        return _read_index(container, stream, name)


def _pictures(data: bytes, name: str, config: FrameConfig, index: _PacketIndex, chosen: list[int]) -> Iterator[Frame]:
    """Yield the frames with the chosen time stamps. Raises `BadVideo` if one of them cannot be decoded."""
    needed, left = index.needed(chosen), iter(chosen)
    wanted = next(left, None)
    too_much = BadVideo(
        name, f"needs more than {config.most_decoded_pixels:,} pixels decoded", "cut it into shorter clips"
    )
    with _opened(data, name, config) as (container, stream):
        if sum(needed) * stream.codec_context.width * stream.codec_context.height > config.most_decoded_pixels:
            raise too_much
        decoded = 0
        for frame in _decoded(container, stream, needed, name):
            decoded += frame.width * frame.height  # frames may grow in the stream
            if decoded > config.most_decoded_pixels:
                raise too_much
            if wanted is None or frame.pts > wanted or (frame.pts == wanted and frame.is_corrupt):
                break
            if frame.pts == wanted:
                yield Frame(index.seconds(wanted), frame.to_image().rotate(frame.rotation, expand=True))
                wanted = next(left, None)
        if wanted is not None:
            reason = f"the frame at {time_text(index.seconds(wanted)).strip()} cannot be decoded"
            raise BadVideo(name, reason, "re-encode it or leave it out")


def _read_index(container: Any, stream: Any, name: str) -> _PacketIndex:
    """Read the time stamps of all packets. Raises `BadVideo` if frames cannot be ordered by them."""
    advice, is_vp8 = "re-encode it as mp4 or webm", stream.codec_context.name == "vp8"
    stamps: list[int] = []
    keys: list[bool] = []
    visible: list[bool] = []
    for packet in _packets(container, stream, name):
        if packet.pts is None:
            raise BadVideo(name, f"frame {len(stamps)} has no time stamp", advice)
        stamps.append(packet.pts)
        keys.append(packet.is_keyframe)
        is_reference = is_vp8 and not bytes(packet)[0] >> 4 & 1  # the bit show_frame: RFC 6386, 9.1
        visible.append(not packet.is_discard and not is_reference)
    index = _PacketIndex(tuple(stamps), tuple(keys), tuple(visible), stream.time_base)
    if not index.shown or not index.unit:
        raise BadVideo(name, "has no frames", "leave it out")
    if len(set(index.shown)) < len(index.shown):
        raise BadVideo(name, "has frames with the same time stamp", advice)
    if index.seconds(index.shown[-1]) > LONGEST_S:
        raise BadVideo(name, f"has time stamps more than {LONGEST_S // 3600} hours apart", advice)
    return index


def _decoded(container: Any, stream: Any, needed: list[bool], name: str) -> Iterator[Any]:
    """Yield the frames of the needed packets in the order in which they are shown."""
    last = None
    for frame in _decoded_packets(container, stream, needed, name):
        if frame.pts is None or (last is not None and frame.pts <= last):
            raise BadVideo(name, "has time stamps that are out of order", "re-encode it as mp4 or webm")
        last = frame.pts
        yield frame


def _decoded_packets(container: Any, stream: Any, needed: list[bool], name: str) -> Iterator[Any]:
    context, decoding = stream.codec_context, False
    for packet, is_needed in zip(_packets(container, stream, name), needed, strict=True):
        if is_needed:
            yield from context.decode(packet)
        elif decoding:  # the decoder restarts at the next group
            yield from context.decode(None)
            context.flush_buffers()
        decoding = is_needed
    if decoding:
        yield from context.decode(None)


def _container(data: bytes) -> str | None:
    """Return FFmpeg's name of the container by its first bytes, or None for what is not read."""
    if data[4:8] in _MP4_BOXES:
        return "mov"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    return "gif" if data.startswith((b"GIF87a", b"GIF89a")) else None


def _is_whole(data: bytes, kind: str) -> bool:
    """Return whether the file is as long as it says. FFmpeg ends a truncated one without an error."""
    match kind:
        case "mov":
            return _end_of_boxes(data) <= len(data)
        case "matroska":
            return _end_of_elements(data) <= len(data)
        case "avi":
            return int.from_bytes(data[4:8], "little") + 8 <= len(data)
        case _:
            return data.rstrip(b"\0").endswith(b";")


def _end_of_boxes(data: bytes) -> int:
    """Return where the last box of an mp4 ends: ISO 14496-12, 4.2."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4])
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16])
        if size == 0:  # up to the end
            return len(data)
        at += max(8, size)
    return at


def _end_of_elements(data: bytes) -> int:
    """Return where the last element of a Matroska file ends: RFC 8794, 4 to 6."""
    at = 0
    while at < len(data) and data[at]:
        at += 9 - data[at].bit_length()
        if at >= len(data) or not data[at]:
            return len(data) + 1
        width = 9 - data[at].bit_length()
        size, unknown = int.from_bytes(data[at : at + width]) & (1 << 7 * width) - 1, (1 << 7 * width) - 1
        if size == unknown:  # a recording that was never closed
            return len(data)
        at += width + size
    return at
