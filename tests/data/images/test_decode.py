"""Decoding of whole pictures: kinds, transparency, 16-bit greys, orientations, and the decoder's fingerprint."""

from __future__ import annotations

import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from core.errors import ConfigError
from data.images import decode as module
from data.images.decode import _SAMPLES, decode, decoder_fingerprint, decoder_versions
from tests.data.images import encoded as make
from tests.data.images.encoded import animation, encoded, png_of_greys, sample, turned

LOSSLESS = ("PNG", "TIFF", "BMP")


def pixels(data):
    picture = decode(data, "x")
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_pictures_are_equal(kind):
    assert (pixels(encoded(sample(), kind)) == np.asarray(sample())).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiffs_are_equal(compression):
    assert (pixels(encoded(sample(), "TIFF", compression=compression)) == np.asarray(sample())).all()


@pytest.mark.parametrize(("kind", "settings"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("GIF", {})])
def test_lossy_pictures_are_close(kind, settings):
    assert abs(pixels(encoded(sample(), kind, **settings)) - np.asarray(sample())).mean() < 12


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_colours_become_rgb(mode):
    grey = Image.new("L", (9, 7), 255)
    data = encoded(grey.convert("RGB").convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert (abs(pixels(data) - 255) <= 1).all()


GREYS = np.array([[0, 257, 0x8080, 65535], [128, 129, 65407, 65406]])


def big_endian_tiff(greys):
    """Return what Pillow cannot write: a TIFF with its 16-bit greys in the other order."""
    return make.tiff(4, 2, 1, greys.astype("<u2").tobytes(), t258=16)


@pytest.mark.parametrize("write", [png_of_greys, big_endian_tiff])
def test_greys_of_16_bits_are_scaled(write):
    found = pixels(write(GREYS))
    assert found[..., 0].tolist() == [[0, 1, 128, 255], [0, 1, 255, 254]]
    assert (found == found[..., :1]).all()


def test_pillows_own_conversion_would_saturate():
    with Image.open(module.io.BytesIO(png_of_greys(GREYS))) as image:
        assert np.asarray(image.convert("RGB"))[0, 1:, 0].tolist() == [255, 255, 255]


def with_alpha(mode, alpha):
    picture = Image.new("RGBA", (4, 4), (100, 100, 100, alpha))
    return encoded(picture.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize(("alpha", "grey"), [(255, 100), (0, 255), (128, 177)])
def test_transparent_pixels_are_blended_with_white(mode, alpha, grey):
    assert (pixels(with_alpha(mode, alpha)) == grey).all()


def test_a_transparent_colour_becomes_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(palette, kind, transparency=0)).tolist() == [[[255] * 3, [40, 50, 60]]]
    coloured = Image.new("RGB", (1, 1), (1, 2, 3))
    assert pixels(encoded(coloured, "PNG", transparency=(1, 2, 3))).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_turned_back(kind, orientation):
    data = turned(sample(), orientation, kind)
    with Image.open(module.io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (pixels(data) == expected).all()
    if kind in LOSSLESS and orientation == 6:
        assert (expected == np.rot90(np.asarray(sample()), -1)).all()


def test_an_orientation_behind_the_pixels_counts_in_both():
    rows = zlib.compress(b"\0\1\2\0\3\4\0\5\6")
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = make.png(2, 3, 8, 0, rows)
    data = whole[:-12] + make.chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:]
    assert pixels(data)[..., 0].tolist() == [[5, 3, 1], [6, 4, 2]]
    assert pixels(whole)[..., 0].tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_ignored(orientation):
    assert (pixels(turned(sample(), orientation, "PNG")) == np.asarray(sample())).all()


@pytest.mark.filterwarnings("ignore::Warning")
def test_damaged_exif_is_ignored():
    data = encoded(sample(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert pixels(data).shape == (48, 64, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    assert (abs(pixels(animation(kind)) - [255, 0, 0]) <= 3).all()


def test_a_missing_pillow_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"pictures need Pillow: pip install 'leviathan\[vision\]'"):
        module.pillow.__wrapped__()


def test_the_fingerprint_depends_on_every_sample(monkeypatch):
    whole = decoder_fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", whole) and decoder_fingerprint.__wrapped__() == whole
    assert set(_SAMPLES) == {"JPEG", "PNG", "WebP"}
    for name, text in _SAMPLES.items():
        assert len(text) * 3 // 4 < 2048
        monkeypatch.setattr(module, "_SAMPLES", _SAMPLES | {name: _SAMPLES["WebP" if name == "PNG" else "PNG"]})
        assert decoder_fingerprint.__wrapped__() != whole


def test_the_fingerprint_notices_one_grey_level(monkeypatch):
    whole = decoder_fingerprint()

    def other(data, name):
        picture = np.array(decode(data, name))
        picture[8:16, 8:16] ^= 1
        return Image.fromarray(picture)

    monkeypatch.setattr(module, "decode", other)
    assert decoder_fingerprint.__wrapped__() != whole


def test_versions_name_the_libraries():
    versions = decoder_versions()
    assert list(versions) == ["Pillow", "libjpeg-turbo", "libwebp", "zlib"]
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())


def test_importing_the_decoder_needs_neither_pillow_nor_torch():
    script = "import sys, data.images.decode; assert not {'PIL', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
