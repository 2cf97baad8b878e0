"""Tiles and normalised values against transformers' on torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import tiles as module
from data.images.canvas import TileConfig
from data.images.tiles import GREYS, bfloat16, normalise, tiles
from tests.data.images.pictures import LLAMA, PICTURES, picture

EVERY = range(len(PICTURES))
TALL = [number for number, (height, width, _) in enumerate(PICTURES) if height > 8 * width > 8]


def cut(number):
    return tiles(Image.fromarray(picture(number)), PICTURES[number][2])


def differences(theirs, numbers=EVERY, order=lambda found: found):
    """Return the absolute differences in greys of all values of some pictures."""
    pairs = [(order(cut(number)[1]), theirs[f"picture{number}"]) for number in numbers]
    return np.concatenate([abs(ours.astype(int) - right).ravel() for ours, right in pairs])


def assert_alike(found):
    assert found.max() <= 1
    assert (found > 0).mean() <= 0.01


def test_tiles_equal_those_of_transformers(theirs):
    assert_alike(differences(theirs))


@pytest.mark.parametrize("number", EVERY, ids=lambda number: "x".join(map(str, PICTURES[number][:2])))
def test_each_picture_equals_that_of_transformers(theirs, number):
    canvas, found = cut(number)
    assert found.dtype == np.uint8 and len(found) == canvas.tiles
    assert found.shape == theirs[f"picture{number}"].shape
    values = differences(theirs, [number])
    assert values.max() <= 1
    # enlarging by a simple ratio gives many values that lie between two greys
    assert (values > 0).mean() <= (0.001 if PICTURES[number][2] is LLAMA else 0.06)


def nearest(picture, height, width):
    return np.asarray(picture.resize((width, height), Image.Resampling.NEAREST))


def without_antialias(picture, height, width):
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    found = torch.nn.functional.interpolate(values, (height, width), mode="bilinear", antialias=False)
    return found[0].permute(1, 2, 0).round().byte().numpy()


def in_one_call(picture, height, width):
    """Resize along the columns first, as one call of Pillow 13 does for tall pictures."""
    columns = picture.resize((picture.width, height), Image.Resampling.BILINEAR)
    return np.asarray(columns.resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("kernel", [nearest, without_antialias])
def test_another_kernel_is_noticed(theirs, monkeypatch, kernel):
    monkeypatch.setattr(module, "_scaled", kernel)
    with pytest.raises(AssertionError):
        assert_alike(differences(theirs))


def test_resizing_along_the_columns_first_is_noticed(theirs, monkeypatch):
    assert_alike(differences(theirs, TALL))
    monkeypatch.setattr(module, "_scaled", in_one_call)
    assert (differences(theirs, TALL) > 0).mean() > 0.05


def test_a_global_tile_that_comes_first_is_noticed(theirs):
    with pytest.raises(AssertionError):
        assert_alike(differences(theirs, order=lambda found: np.roll(found, 1, axis=0)))


def test_tiles_by_columns_are_noticed(theirs):
    wide = [number for number, (height, width, _) in enumerate(PICTURES) if (height, width) == (333, 1000)]
    with pytest.raises(AssertionError):
        assert_alike(differences(theirs, wide, lambda found: found[[0, 2, 1, *range(3, len(found))]]))


def test_greys_equal_those_of_transformers(theirs):
    assert GREYS.dtype == np.float32 and (theirs["table"] == GREYS).all()
    half = torch.tensor(0.5, dtype=torch.bfloat16)
    values = torch.arange(256, dtype=torch.uint8).to(torch.bfloat16) * (1 / 255)
    assert (((values - half) / half).float().numpy() == GREYS).all()


def test_greys_in_float32_are_noticed(theirs):
    plain = (np.arange(256, dtype=np.float32) / 255 - 0.5) / 0.5
    assert 0.001 < abs(plain - theirs["table"]).max() < 0.004


def test_bfloat16_rounds_as_torch_does():
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    ties = (np.arange(1, 3000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    for some in (values, ties, -values * 1e30, np.zeros(2, np.float32)):
        assert (bfloat16(some) == torch.from_numpy(some).bfloat16().float().numpy()).all()


def test_equal_greys_give_equal_values(theirs):
    ours, right = cut(0)[1], theirs["picture0"]
    assert (ours == right).all()
    assert (normalise(ours) == theirs["table"][right]).all() and normalise(ours).dtype == np.float32


def test_what_a_picture_does_not_cover_is_black():
    white = Image.new("RGB", (28, 30), (255, 255, 255))
    canvas, found = tiles(white, TileConfig(28))
    assert (canvas.rows, canvas.columns, len(found)) == (2, 1, 3)
    assert (found[0] == 255).all() and (found[1, :, :2] == 255).all() and (found[1, :, 2:] == 0).all()
    assert (found[2] == 255).all()
    assert (normalise(found)[1, :, 2:] == -1).all()


def test_a_picture_that_is_not_rgb_is_refused():
    with pytest.raises(ValueError, match="the mode is L, but must be RGB"):
        tiles(Image.new("L", (3, 3)), TileConfig())
