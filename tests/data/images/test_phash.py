"""Perceptual hashes: copies of a picture are near, other pictures are far, and groups equal those of all pairs."""

from __future__ import annotations

import io
import random
import time
from typing import Any

import numpy as np
import pytest
import scipy.fft
from PIL import Image, ImageDraw, ImageEnhance

from core.errors import ConfigError
from data.images import phash
from data.images.phash import FARTHEST, near_duplicates, perceptual_hash, shared_origins


def scene(seed: int, size: int = 160) -> Image.Image:
    """Draw some balls and boxes on a slope of colours."""
    chance = random.Random(seed)
    ends = np.array([[chance.random() for _ in range(3)] for _ in range(2)]) * 255
    slope = np.linspace(0, 1, size)[:, None, None]
    ground = (ends[0] * slope + ends[1] * (1 - slope)) * np.ones((1, size, 1))
    picture = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(chance.randint(3, 9)):
        x, y, side = chance.randrange(size), chance.randrange(size), chance.randint(size // 10, size // 3)
        shape = draw.ellipse if chance.random() < 0.5 else draw.rectangle
        shape((x, y, x + side, y + side), fill=tuple(chance.randrange(256) for _ in range(3)))
    return picture


def encoded(picture: Image.Image, kind: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return Image.open(buffer).convert("RGB")


COPIES = {
    "jpeg": lambda picture: encoded(picture, "jpeg", quality=40),
    "webp": lambda picture: encoded(picture, "webp", quality=40),
    "small": lambda picture: picture.resize((57, 61), Image.Resampling.BILINEAR),
    "large": lambda picture: picture.resize((400, 300), Image.Resampling.BICUBIC),
    "thumb": lambda picture: encoded(picture.resize((64, 64)), "jpeg", quality=75),
    "bright": lambda picture: ImageEnhance.Brightness(picture).enhance(0.8),
    "grey": lambda picture: picture.convert("L"),
}


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_near(copy):
    far = [distance(perceptual_hash(scene(n)), perceptual_hash(COPIES[copy](scene(n)))) for n in range(40)]
    assert max(far) <= 6, far


def test_other_pictures_are_far():
    hashes = [perceptual_hash(scene(seed)) for seed in range(80)]
    distances = [distance(one, other) for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(distances) > FARTHEST and 28 < np.mean(distances) < 36


def test_a_turned_picture_is_not_a_copy():
    far = [distance(perceptual_hash(scene(n)), perceptual_hash(scene(n).rotate(90))) for n in range(10)]
    assert min(far) > FARTHEST


def test_flat_pictures_and_odd_shapes():
    for shape in ((1, 1), (1, 1, 3), (7, 300, 3), (33, 2, 4)):
        assert perceptual_hash(np.full(shape, 77, np.uint8)) == 0
    picture = np.random.default_rng(0).integers(0, 256, (5, 41, 3), np.uint8)
    assert 0 < perceptual_hash(picture) < 2**64
    assert perceptual_hash(picture) == perceptual_hash(picture.astype(np.float32))


def test_hash_is_the_signs_of_the_cosine_transform():
    """The transform of another library gives the bits; the picture's size needs no averaging."""
    for seed in range(10):
        picture = np.random.default_rng(seed).integers(0, 256, (32, 32), np.uint8)
        strengths = scipy.fft.dctn(picture.astype(float))[1:9, 1:9].ravel()
        bits = "".join(str(int(strength > np.median(strengths))) for strength in strengths)
        assert perceptual_hash(picture) == int(bits, 2)


def test_hash_stays_the_same():
    """Saved hashes must keep their meaning."""
    y, x = np.mgrid[:96, :128]
    assert perceptual_hash(((x * 2 + y) % 256).astype(np.uint8)) == 0x6B52555555555555


def changed(value: int, bits: int, chance: random.Random) -> int:
    return value ^ sum(1 << bit for bit in chance.sample(range(64), bits))


def all_pairs(hashes: list[int], limit: int) -> list[list[int]]:
    """Group by comparing all pairs."""
    group = list(range(len(hashes)))
    for one, value in enumerate(hashes):
        for other in range(one):
            if distance(value, hashes[other]) <= limit and group[one] != group[other]:
                low, high = sorted((group[one], group[other]))
                group = [low if member == high else member for member in group]
    groups = [[index for index, member in enumerate(group) if member == first] for first in range(len(hashes))]
    return [members for members in groups if len(members) > 1]


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 6, 8, 11])
def test_groups_equal_those_of_all_pairs(limit):
    chance = random.Random(limit)
    hashes: list[int] = []
    for _ in range(60):
        hashes.append(chance.getrandbits(64))
        hashes += [changed(hashes[-1], max(0, limit + extra), chance) for extra in (-1, 0, 1)]
    chance.shuffle(hashes)
    found = near_duplicates(hashes, limit)
    assert found == all_pairs(hashes, limit)
    assert len(found) >= 50 and found != all_pairs(hashes, limit + 1)


def test_groups_are_found_through_others():
    chain = [0, 0b111111, 0b111111111111]
    assert near_duplicates(chain, 6) == [[0, 1, 2]]
    assert near_duplicates(chain[::2], 6) == []
    assert near_duplicates([]) == [] == near_duplicates([5])


def test_bands_must_be_searched_around(monkeypatch):
    """The control: bands that must agree exactly miss pairs."""
    chance = random.Random(0)
    hashes = [chance.getrandbits(64) for _ in range(50)]
    hashes += [changed(value, 6, chance) for value in hashes]
    assert len(near_duplicates(hashes, 6)) == 50
    whole = phash._candidates
    monkeypatch.setattr(phash, "_candidates", lambda hashes_H, _: whole(hashes_H, 0))
    assert len(near_duplicates(hashes, 6)) < 50


def test_many_pictures_do_not_take_all_pairs():
    """Copies and hashes that all are near each other take seconds too."""
    chance = random.Random(0)
    hashes = [chance.getrandbits(64) for _ in range(20_000)]
    crowd = [hashes[0] ^ low for low in range(2**12)]
    start = time.process_time()
    assert near_duplicates([*hashes, *crowd, *[hashes[0]] * 10_000], 6) == [[0, *range(20_000, 30_000 + 2**12)]]
    assert time.process_time() - start < 10


def test_a_distance_that_cannot_be_searched():
    for wrong in (-1, FARTHEST + 1):
        with pytest.raises(ConfigError, match="must be from 0 to 11"):
            near_duplicates([1, 2], wrong)


def test_documents_with_a_common_picture_share_an_origin():
    pictures = [["b", "a"], ["c"], ["d", "b"], [], ["d"], ["e"], ["c", "c"], []]
    assert shared_origins(pictures) == ["a", "c", "a", None, "a", "e", "c", None]


def test_no_picture_is_on_both_sides_of_the_split():
    chance = random.Random(3)
    pictures = [[str(chance.randrange(300)) for _ in range(chance.randint(1, 2))] for _ in range(200)]
    origin = {}
    for digests, found in zip(pictures, shared_origins(pictures), strict=True):
        for digest in digests:
            assert origin.setdefault(digest, found) == found
    own = [min(digests) for digests in pictures]  # the control: the least digest of each document alone
    sides: dict[str, set[str]] = {}
    for digests, found in zip(pictures, own, strict=True):
        for digest in digests:
            sides.setdefault(digest, set()).add(found)
    assert any(len(found) > 1 for found in sides.values())
