"""Write small videos with given pictures and time stamps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

MILLISECOND = Fraction(1, 1000)


def pictures(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Return pictures that differ in brightness and in the place of a bright bar."""
    made = []
    for number in range(count):
        picture = np.full((height, width, 3), (number * 5 % 200, 40, 90), np.uint8)
        picture[:, number % width : number % width + 6] = 255
        made.append(picture)
    return made


def written(
    shown: Sequence[np.ndarray],
    stamps: Sequence[int],
    codec: str = "ffv1",
    container: str = "matroska",
    pixels: str = "bgr0",
    unit: Fraction = MILLISECOND,
    turn: int = 0,
    **options: str,
) -> bytes:
    """Return a video whose picture n is shown from `stamps[n] * unit` seconds on. `turn`: its rotation in degrees."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, 10, options=options)
        stream.height, stream.width = shown[0].shape[:2]
        stream.pix_fmt, stream.time_base = pixels, unit
        stream.codec_context.time_base, stream.codec_context.thread_count = unit, 1
        if turn:
            stream.set_display_rotation(turn)
        for picture, stamp in zip(shown, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, unit
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def all_frames(data: bytes) -> dict[float, np.ndarray]:
    """Return every frame of a video by its time in seconds, decoded in one go."""
    with av.open(io.BytesIO(data)) as container:
        decoded = [
            (frame.pts, frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
        ]
    first = min(pts for pts, _, _ in decoded)
    return {float((pts - first) * unit): picture for pts, unit, picture in decoded}
