"""Data that is not a picture, and damaged, huge or harmful pictures, raise `BadImage` with one line."""

from __future__ import annotations

import random
import subprocess
import sys
import zlib

import pytest
from PIL import Image, ImageFile

from data.images.canvas import TileConfig
from data.images.decode import BadImage, decode
from data.images.tiles import tiles
from tests.data.images.encoded import animation, encoded, huge_png, png, sample, text_bomb, tiff, turned

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # pytest undoes the filter of the module
WHOLE = {kind: encoded(sample(200, 300), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")}
FOREIGN = "is not a whole PNG, JPEG, WebP, GIF, TIFF or BMP picture: convert or remove it"
DAMAGED = r"cannot be decoded \(.+\): replace or remove it"
LARGE = "more than 40,000,000: make it smaller or remove it"


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


HEADER = {
    "empty": (b"", "is empty"),
    "one byte": (b"\xff", FOREIGN),
    "zeros": (bytes(1000), FOREIGN),
    "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", FOREIGN),
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', FOREIGN),
    "ico": (encoded(sample(), "ICO"), FOREIGN),
    "ppm": (encoded(sample(), "PPM"), FOREIGN),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", FOREIGN),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05hello\x94.", FOREIGN),
    "0x0 png": (png(0, 0, 8, 2, zlib.compress(b"")), FOREIGN),
    "header's checksum": (flipped(WHOLE["PNG"], 17), FOREIGN),
    "cut header": (WHOLE["PNG"][:20], DAMAGED),
    "unknown compression": (tiff(10, 10, 999), FOREIGN),
    "pixel bomb": (huge_png(), f"has too many pixels, {LARGE}"),
    "60 million pixels": (huge_png(10_000, 6_000), f"has 10000 x 6000 pixels, {LARGE}"),
    "100 million pixels": (huge_png(10_000, 10_000), f"has 10000 x 10000 pixels, {LARGE}"),
    "huge tiff": (tiff(2**31 - 1, 2**31 - 1), LARGE),
    "one long column": (huge_png(1, 65_536), "has 1 x 65536 pixels, a side of more than 65,535: cut it into several"),
    "one long row": (huge_png(65_536, 1), "has 65536 x 1 pixels, a side of more than 65,535: cut it into several"),
    "text bomb": (text_bomb(), "MAX_TEXT_CHUNK"),
    "cut webp": (WHOLE["WEBP"][:200], DAMAGED),
}
"""Seen in the header."""
PIXELS = {
    **{f"cut {kind}": (WHOLE[kind][: len(WHOLE[kind]) * 2 // 3], DAMAGED) for kind in ("PNG", "JPEG", "TIFF", "BMP")},
    "checksum of pixels": (flipped(WHOLE["PNG"], 200), DAMAGED),
    "short tiff": (tiff(1000, 1000), DAMAGED),
    **{f"tiff of kind {kind}": (tiff(100, 100, kind), DAMAGED) for kind in (4, 5, 7, 8)},
    "32-bit greys": (encoded(Image.new("I", (4, 4), 70_000), "TIFF"), "convert it to 8 or 16 bits"),
    "floats": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "convert it to 8 or 16 bits"),
}


def refused(data, **settings):
    with pytest.raises(BadImage) as caught:
        decode(data, "shard-3.tar/cat.png", **settings)
    line = str(caught.value)
    assert line.startswith("shard-3.tar/cat.png: ") and "\n" not in line and " at 0x" not in line
    return caught


@pytest.mark.parametrize("case", HEADER)
def test_a_bad_header_is_one_line(case):
    data, message = HEADER[case]
    assert refused(data).match(message)


@pytest.mark.parametrize("case", PIXELS)
def test_bad_pixels_are_one_line(case):
    data, message = PIXELS[case]
    assert refused(data).match(message)


def test_a_name_from_a_file_cannot_write_to_the_terminal():
    with pytest.raises(BadImage) as caught:
        decode(b"", "a\x1b[31m\nb.png")
    assert str(caught.value) == r"a\x1b[31m b.png: is empty: replace or remove it"


def test_the_limit_is_the_callers():
    data = encoded(sample(10, 20))
    assert decode(data, "x", largest_pixels=200).size == (20, 10)
    assert refused(data, largest_pixels=199).match("has 20 x 10 pixels, more than 199: make it smaller")


@pytest.mark.parametrize(("height", "width"), [(65_535, 2), (2, 65_535)])
def test_the_longest_pictures_are_cut(height, width):
    canvas, found = tiles(decode(encoded(Image.new("RGB", (width, height), (9, 9, 9))), "x"), TileConfig())
    assert max(canvas.rows, canvas.columns) == 16 and (found[-1] == 9).all()


def test_too_many_pixels_are_never_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded the pixels"))
    assert refused(huge_png(10_000, 10_000)).match("has 10000 x 10000 pixels")


def test_nothing_is_printed_and_pillow_keeps_its_settings():
    """In a process of its own: libtiff prints past Python, and pytest has filters of warnings of its own."""
    script = """
import sys
from PIL import Image, ImageFile
before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, dict(Image.MIME)
from tests.data.images.test_bad_pictures import HEADER, PIXELS, WHOLE, BadImage, decode
from data.images.tiles import tiles
from tests.data.images.encoded import sample, turned
damaged = [turned(sample(), 6, "TIFF"), WHOLE["JPEG"][:2] + WHOLE["JPEG"][20:]]
for data in [one for one, _ in (HEADER | PIXELS).values()] + damaged:
    try:
        decode(data, "x")
    except BadImage:
        continue
assert before[:2] == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pillow_alone_would_print():
    script = """
import io
from PIL import Image
from tests.data.images.test_bad_pictures import HEADER, PIXELS
Image.open(io.BytesIO(HEADER["100 million pixels"][0]))
try:
    Image.open(io.BytesIO(PIXELS["tiff of kind 8"][0])).load()
except OSError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n" and "DecompressionBombWarning" in done.stderr and "ZIPDecode" in done.stderr


def test_random_damage_is_refused_or_decoded_to_the_size():
    chance = random.Random(5)
    whole = [encoded(sample(20, 30), kind) for kind in WHOLE]
    whole += [animation("GIF"), animation("WEBP"), animation("PNG"), turned(sample(20, 30), 6, "JPEG")]
    whole += [encoded(sample(20, 30), "TIFF", compression="tiff_lzw"), turned(sample(20, 30), 5, "PNG")]
    outcomes = [0, 0]
    for data in whole:
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(chance.choice((1, 1, 3))):
                place = chance.randrange(min(len(damaged), 400))
                damaged[place : place + chance.choice((1, 1, 1, 0, 4))] = chance.randbytes(chance.choice((1, 1, 1, 0)))
            try:
                picture = decode(bytes(damaged), "x", largest_pixels=1_000_000)
            except BadImage:
                outcomes[0] += 1
                continue
            outcomes[1] += 1
            assert picture.mode == "RGB"
    assert min(outcomes) > 100
