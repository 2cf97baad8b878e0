"""Decode the bytes of a picture to RGB by Pillow. Every failure is a `BadImage` with one line.

What is decoded depends on the versions of the libraries below Pillow: `decoder_fingerprint` tells whether two machines
agree. A JPEG with flipped bytes often decodes without an error, so keep checksums of the bytes.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from core.errors import DataError, first_line
from data.images.canvas import TileConfig
from data.images.packages import require
from data.images.tiles import tiles

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
LARGEST_PIXELS = 40_000_000
"""Most pixels of a picture, unless the caller says otherwise."""
LONGEST_SIDE = 65_535
"""Most pixels of a side, as in a JPEG. To resize a column of 40 million pixels to one tile would take 50 GB."""
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""The EXIF orientations other than 1, with the number of Pillow's `Transpose` that undoes each."""
_ORIENTATION = 0x0112
_MAY_BE_TURNED = re.compile(rb"eXIf|Raw profile type|adobe\.xmp")
"""What a PNG with an orientation holds."""


class BadImage(DataError):
    """A picture cannot be used. The line has its name, the reason and what to do."""


def decode(data: bytes, name: str, largest_pixels: int = LARGEST_PIXELS) -> Any:
    """Return the picture in `data` as an RGB image of Pillow, turned as its EXIF orientation says.

    Of an animation it is the first frame. Transparent pixels are blended with white. `name` is for the message. Raises
    `BadImage`, and `ConfigError` without Pillow.
    """
    with _opened(data, name, largest_pixels) as image:
        image.load()
        turn = _TURNS.get(_orientation(image, data))
        picture = _rgb(image, name)
        return picture if turn is None else picture.transpose(turn)


@contextmanager
def _opened(data: bytes, name: str, largest_pixels: int) -> Iterator[Any]:
    """Yield the image with its pixels not yet decoded. Turn each error until the end of the block into `BadImage`."""
    image_module = pillow()
    largest = min(largest_pixels, 2 * (image_module.MAX_IMAGE_PIXELS or largest_pixels))
    limit = f"more than {largest:,}: make it smaller or remove it"
    if not data:
        raise BadImage(f"{name}: is empty: replace or remove it")
    try:
        with image_module.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < 1:
                raise BadImage(f"{name}: has {width} x {height} pixels: replace or remove it")
            if width * height > largest:
                raise BadImage(f"{name}: has {width} x {height} pixels, {limit}")
            if max(width, height) > LONGEST_SIDE:
                reason = f"a side of more than {LONGEST_SIDE:,}: cut it into several or remove it"
                raise BadImage(f"{name}: has {width} x {height} pixels, {reason}")
            yield image
    except BadImage:
        raise
    except image_module.DecompressionBombError:
        raise BadImage(f"{name}: has too many pixels, {limit}") from None
    except image_module.UnidentifiedImageError:
        reason = "is not a whole PNG, JPEG, WebP, GIF, TIFF or BMP picture: convert or remove it"
        raise BadImage(f"{name}: {reason}") from None
    except Exception as error:  # damaged bytes make Pillow's readers raise nearly every kind
        raise BadImage(f"{name}: cannot be decoded ({first_line(error)}): replace or remove it") from None


@cache
def pillow() -> Any:
    """Return the module `PIL.Image`, and keep Pillow from writing to the terminal: a warning in a picture of another's
    data set helps nobody. Raises `ConfigError` if Pillow is not installed.
    """
    require("PIL")
    from PIL import Image

    # `warnings.catch_warnings` around each picture is not safe in threads, and makes old warnings of others repeat
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    _silence_libtiff(Image.core.__file__)
    return Image


def _silence_libtiff(library: str) -> None:
    """Keep libtiff from printing errors past Python; Pillow raises them too. `library`: of Pillow, linked with it."""
    try:
        silence = ctypes.CDLL(library).TIFFSetErrorHandler
    except (OSError, AttributeError):  # built without libtiff, or with its names hidden
        return
    silence.argtypes, silence.restype = [ctypes.c_void_p], ctypes.c_void_p
    silence(None)


def _orientation(image: Any, data: bytes) -> int:
    """Return the EXIF orientation that is still to be undone, 1 if there is none or it is damaged."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    if image.format == "PNG" and not _MAY_BE_TURNED.search(data):
        return 1  # `getexif` would decode the pixels to look behind them
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as many kinds as for pixels; viewers show such a picture as it lies
        return 1
    return found if isinstance(found, int) else 1


def _rgb(image: Any, name: str) -> Any:
    """Return a loaded image in RGB."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion makes every level above 255 white
        greys = (np.asarray(image).astype(np.uint32) + 128) // 257
        return pillow().fromarray(greys.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"{name}: has greys of 32 bits, whose range is not known: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = pillow().new("RGBA", layer.size, (255, 255, 255, 255))
        return pillow().alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


@cache
def decoder_fingerprint() -> str:
    """Return the SHA-256 of a built-in JPEG, PNG and WebP picture, decoded and cut into tiles."""
    digest = hashlib.sha256()
    for name, text in _SAMPLES.items():
        _, found = tiles(decode(base64.b64decode(text), f"the built-in {name}"), TileConfig(28, 14, 4))
        digest.update(found.tobytes())
    return digest.hexdigest()


def decoder_versions() -> dict[str, str]:
    """Return the versions of Pillow and of the libraries that decode, for a message about two fingerprints."""
    pillow()
    import PIL
    from PIL import features

    libraries = {"libjpeg-turbo": "libjpeg_turbo", "libwebp": "webp", "zlib": "zlib"}
    versions = {name: features.version(feature) for name, feature in libraries.items()}
    return {"Pillow": PIL.__version__} | {name: str(version or "not built in") for name, version in versions.items()}


_SAMPLES = {
    "JPEG": """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABcQERQRDhcUEhQaGBcbIjklIh8fIkYyNSk5UkhXVVFIUE5bZoNvW2F8Yk5QcptzfIeLkpSSWG2grJ+OqoOPko
3/2wBDARgaGiIeIkMlJUONXlBejY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY3/wAARCABQAGADASIAAhEBAxEB
/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1FhByJxFDKBkaEII0KxwRVS0fAkM2
JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5
usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/8QAHwEAAwEBAQEBAQEBAQAAAAAAAAECAwQFBgcICQoL/8QAtREAAgECBAQDBAcFBA
QAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYkNOEl8RcYGRomJygpKjU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0
dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0tba3uLm6wsPExcbHyMnK0tPU1dbX2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAx
EAPwDlAKt2Q+/+FSi2i/u/qabKPI2+V8u7r3rFyUtEZtqfuosgVngVKJ5f736Crgtov7n6mpXubiS9nuRWQ+/+FXQKqyjyNvlfLu696Flm/vfoKl03N3iP
kc3zIiUVdsR9/wDCpRaR/wBz9TTZF8jb5Xy7uvepnrpY1UlP3UW1FUVFPWeX+9+gq8ttF/c/U1lbk3NoL2e4yxH3/wAKvqKqSL5G3yvl3de9CzS/3v0FYy
puWqN1BzfMjnhdf7H604L9q/2Nv45zTRay/wBz9RU8C+Rnzfl3dO9dzsvh3OBqK1juNFl/t/pT1ucn/V/rUwmi/vfoaalpKB9z9RWtGHtH75K1+MeqC5/2
dv45zUgsv9v9KWBfIz5vy7unerKzRf3v0NdusdI7E3kn7uxCt1/0z/WpAn2vr8u38etRray/3P1FWbdfIz5vy7uneiUY20NbRWsdyP7Bj+P9KkW5/wCmf6
1ZEsRH3v0NV1tJc/d/UV59WlZ3exvTfN8ZIq/av9jb+Oabd23lwYEnLcdO1T26+Rnzfl3dO9Vrm6jknI3cLwODWMYty02JxVaVKm1DroUQtQXa/c/GoQtX
LJfv/hSS5dTBx5PeKaJ8wraC0iL8wqoEruw754sl/vCa6X7n41Cq1csU+/8AhV1Urp5+XQFPk90aq1FdL9z8agVKvWKff/Cny8upajye8VFWtTZ81SBQBk
9KzwA3IrmruM1bqbw/eDtSbyYVYdTkD61jKlaQbzJnUdEwPx71KWjiUNK6oM4yxxU01yK1jysViOaryLVIoC0i/ufqabKnkbfK+Xd171KLj/pn+tPCfav9
jb+Oa8uLa+LY6/eTvLYqiWX+9+grRW1iI+5+pqMWH+3+lSJc4/5Z/rXVSq2fu7Cl73wBInkbfK+Xd170iyy/3v0FSSzQsm6aRYgvTPJP4VUkvrdMiIvIR0
O3AP8AX9K9WnFyW1y6cJSWxqLaRf3P1NJOBahTH8u7r3zTJ57gg+W6Rg9PkyR+uP0rOmmngk3zyNcGToD8oXHoK5K1Zw92LvJ9DSjRlN6v5F3z5nPLfoKr
Xmr2ttEfJt2kPQEtt/EdabHf46wc/wC9/wDWqpd6Z5k20TcJx9zv371OFw1pc1bdm9dww9Nueje39LsR2FxJciUNhBheIyR6985qybCCRizqWY9Szkn+dQ
LH/Zn/AE18z8MY/wD11Mmo/wDTD/x7/wCtXqOEm7w2PGUZN81PYa88EbYaVScZ+U7v5VLBeYz9mi8/+9823H5iscR1qaRH/rfw/rXz0oRjG+57NWjGMG3q
PkudTfiOJIhnIxgnHpyaet3bf89P/HTV4R1grHWlFRn0sRSjGp0tbsW7lPtuz7N8+zO7tjP1+lMXT7r/AJ5fqP8AGrujx/638P61qrHXQq8qT5YlOs6T5F
sij9qtmOTJ/wCOmo7iIXuz7KN+zO7tjPTr9KqLHVu0u4bEOZlchsfdA4x+PvWqpKL546s3VPk96GrK1zZXMUJxH8zcD5h/jTlu7b/np/46aqXXiCSd90Vu
qdhubPH4YqNUAGT0r0I0pct6uh4uKlPETvU0S2sXLmP7bs+zfPszu7Yz9fpWfIyxrnzIyDxlXDH9KgvctsGMDmokjrkqYhtclN6fidWGocsVrof/2Q==
""",
    "PNG": """
iVBORw0KGgoAAAANSUhEUgAAADAAAAAoCAIAAAA35e4mAAAEbklEQVR42q1XW47cOAwUiyXJcn/sPfZMRtAI9hIJtud/pif38EcQzBHzIUumzH4kQQzCoI
RqslwiqRmBhIAQEKTbEgQB1lZRBGtcArFbRIirxOogpGrL5uRuq2SEydoSCgYjw/ZICBJENqcyDM1EQ2gmGgI3E/51vxHqVKrT2Ygh1GnJGEXc+/HyIYY7
ERHzhgSIoDkqQUW0OZTA/f14+ZsYSggiVRnZnkpoZwNDpZoJ8bd9LvVsdgqyBoHA2iKKwbgGQgZb5LjzZxhzZN1gFBKjkBiFYL7snv0RhnAKQYxCqI5CFN
gVAgghvnD3xfivd/Z/wSdCgLQ5ZAnBcjJsoPjSAmGM25eXtny9j8HtTWrvb3M8gzyAdkJQfFUItQdqjtro4Ia5EG/PMEMc+fefUOexAAIRQJbKohICAKyV
ysZGAS6woSMQV4nVARIkAWlBAhIk4y0DGcirZGDaTCZgWlCAAimozqBQGBUyj3ZtKi1Q0T6rmYrb6f7LptMjTDOqBDMExyNrpmrZ3CGkD5NdiLfHmLIRol
OITiFaNqoAWaOo/TKTSXkD80Jen2F2QlWe0AjZFgO4U6kOaaOoIWQ2b2DSPUzZMZ9cl622ywAAnwZ5FMq1x9XN+TQub2PScwzp5tBwZAJ8BQd5jEImNHUM
fRPzQlyfYegmNQ+T2h6Z3iKkhpDeSdYxyWPKsBPdX4zxUNJAhG0xBRh5TBYdoduY9ATTCBmFolMoOoWG9DSEeCcZDaEBUw4Yfnc1dD7UELC6Gjof0pPruI
TyzFuY/ARjjswr5I/MK9QiRuNveozLDZPs5uQxTG4OJTeHkmUDhTId9GDbMaETR4oV8/4E0wiZI0tuUieMk7oSsgwOhGiS2Z3UaogEp5sYZneX5cNd9op8
sRWtUGbXUzkeQ+dDssj87RGm+jw7hVan0NkptDqFzmNukGv3mypnK08kyIn83vBNIVdD2dVQdjWUXQ1lQ2XToy7jvp+T8S3G/LYRCreOrD35TfH/0GVZBz
aD+HEk1Gm9t2ON010MycnNocnNoQmKq+XESY/tOh2+NXKNLU0k3onIKY7pY/uV2efkJvXkJvVUj+yquIyEDK2JYyab7Nu+uclzk1AkIvnD3WWf3V229op+
U1wU4GfXrjP5Yzy1JQ1sEPkjHtNvGEvoNxSqBXRVXHaFpjsKbXp0Nqnu5O5vGEsodUK/UkP2Lru2QC+uhmopfDPJesqUp2F5E0MW12XFddnq7rJSFbq2WI
mlVW6PXsZP3zCdQSIiy7jE1AmZOVREABTDqbg5VNwcKhy6dyNk5NkJJUPR+JiIRP7nJvWHm9SLm9QfblIvh0kd+RHN1ycicRmXSPzo/rQ5LO4uK+7/sqLH
u6y4u6y4DjI7edvJR0IlEbnpVAnNTqHZKTQ7hWan0OwUmr1Clk0mEue8+yMhU0Ozu8tmV0Ozq6HZ1dC81VBG5JyItL339JnzuEQiT67LTq7LTq7LTu4uO4
3yIPIUiZisSCcrTyYyT51Q3Uk/ASQmdVulSdwEAAAAAElFTkSuQmCC
""",
    "WebP": """
UklGRroFAABXRUJQVlA4IK4FAAAQHwCdASpgAFAAPsFeqk8npSQ/pXZpS/AYCWwBOAEkswBxTEcPAeZPVv7V+Ot46l3y+ecPFt6q/yB7An96/r/+X6kHmA
/XX1+fQh/pfUA/2/+Q9bn/pewf6AHlk/t/8L/+O/4H7i+2BmsH9760v4ydCeqP/l+rj+xfxSdmqT/kosFv/qlrJfZ8nq9FTxsUigdsyWmQEKMIY2i0qHd5
ZscQeFKC412vPZxXqfa6X/L4mDhsz3LIFpVJmcRZhD4VvOg/9PZIVXWlitQUjkLnsj5kY6cQdmWHaMU8GwQT6agoLvvtyyKn4ICOAyKL+nDmmxAPDGAY7d
YorM1KuNIGrsz1EAD+1X/s1uT5FpN6JqvTaaMsCCkGeGlfX+tRxq+EUBVZBPSNwPcGavv+l1XaXd/GDStUU7e0Xj5cv2h0Mp/vuhDmn1/gVS+5J9ZdIqKI
e+gOLv6mzWDop8m/R5+r9gbPLyjFR+1gnAcWBkCEzV4lNiB1q7fIXnFlcYBeqw1AeK4P4373L/K0GVNagFOoYiT5NoMWz26iJCwLV13woWM8W4K5D+Ge0h
q5QX1RcTqe4FgfaaLv1T87n6Zmg/j5BIRMyfF2RqGRbdTTzpKCh+vvlCSJGIlKRoEi3yznnYx9t7poeTRn7A1CtyH5XfrjEkgkhEQ/fNrd0bcIqJYbPm6B
uRIBG1rF4NcQPYaC1Oz3dByTJiSguWEJMtaiDM2HjGNztpl6dtNfN9aSXfVwVzpi9upqru/N3l7eNesa9l2opFMgDIzvlO+Nrwhx20dm+Blhw+V64PpWhi
YpTXAL4HF9LyoQhuNS/scp2BY7h9vpwSB5KiSncrbNb7FPUU1cvUCzCnuIlOJhD8B9Cq4i/kn/JJez/lHaN/yLy4VKne1b4LlMnwv3etCtZGdY1dsrDwpJ
BwcB9HuE5KE719WlgnYGBPebSdHeCDjnsIZG5Bx1L7h2l8Ron9L5tEtVDEdt/+MsBLIL/DHXrAeVOtQckmXQMh0vat3F+1tkh0esq7jzctqFUrLca+0LCv
tU1yHr0y+hLAtaLCPzScncNB3ox/Egbz8C8StENKifz1IUjzR6VULMBFDnptRjNN1Stx2XTCmQN23/2hybw2PfEO0be3y7/sOb33Vz0L8WXsBPtOyvQbmS
NFvZKAPZBHNIRL54gYHhi3oTKJCgNykICG6kCK0UV93dHw8GpIT4IX9Nb4CbPjoBlcx2DCF5C4XEe6j6sERDYc8NRMSh/pPd7Ck+IgWrTKQ/sjxFycbSN6
v6WT2iZQWb4HkhK15jsp8/HQkBcLdwlifZ+mAdz5Ph/wD/yKYn0fviuxoziZ4nMrwrLTW4YHYm2q8I4BY1tu86UsHF8V6e/rCPtndCRipE/2laD46YB7vd
qz4grWXvncPe/a/fbjYr0GZtKrV6/Hv1fXbElLWhm7WhT1A4QtY8u8D20P4NVwAnhzGxWSIoCvSnpUJlkFqHysCO6/m1SwsJB9pNJMt/MbaItw4rnap5VU
amh8PgNp9uqUqnDRUuFpRI9jVG7KBKuitcdrNZg0XT0Ery7VbzplOqDU4HCx4J83BllC/VqDyBWaq05JDEXHF21wW25ZYb+YydJHaQFqQEUuQahJhwtT5H
RD8ZY0zd3DqePNdNvXPLJMKq/4RRtmgreeZKi8MCTbD51TkwFhL9dOgShMc4vwBaVclU3EWQJPKJQb7zaWUoUD9hhRMKNy+D2roGdBWFDRGLzCAHYK6Ad6
Y+QbtcTsOzJZW7t6QHG/xjsufwtEerIedEWIw4nm9F66vBJoVEivR7t+CaR3a9yYdbAFgYFVWQ54m8wxKe9ExXwjElw2EBiD7XfsuhKs9ABp6zutwdFxXp
N4cEh25GnkAx9WJ/p+/hQXa9JXjJ4bvI372EXzhwHkKlJdXhbdpLr4ugOov6cHoDyFXoVEFVzPoAAA==
""",
}
"""Pictures of gradients and edges, 96 x 80 (the PNG 48 x 40), encoded once by Pillow 13."""
