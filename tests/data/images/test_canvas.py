"""Canvases and placeholder tokens against transformers' on 5,000 sizes."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from core.errors import ConfigError
from data.images import canvas
from data.images.canvas import Canvas, ImageTokens, TileConfig, best_canvas, placeholder_ids, placeholder_length
from tests.data.images.pictures import sizes

IDS = ImageTokens(start=200080, end=200081, image=200090, patch=200092, tile_x=200084, tile_y=200085)
GLOBAL = [IDS.image, *[IDS.patch] * 144, IDS.end]


def scale(height, width, config, found):
    """Return by how much a picture is enlarged on a canvas."""
    sides = ((found.rows, height), (found.columns, width))
    return min(np.float32(tiles * config.tile_size) / np.float32(side) for tiles, side in sides)


def other_canvases(theirs, rule):
    """Return on how many of the 5,000 sizes the rule chooses another canvas than transformers."""
    found = [rule(*size) for size in sizes()]
    return sum((one.rows, one.columns) != tuple(right) for one, right in zip(found, theirs["canvases"], strict=True))


def largest_of_equals(height, width, config):
    best = scale(height, width, config, best_canvas(height, width, config))
    every = [Canvas(*grid) for grid in canvas._grids(config.max_tiles).tolist()]
    equal = [one for one in every if scale(height, width, config, one) == best]
    return max(equal, key=lambda one: one.rows * one.columns)


def test_canvases_equal_those_of_transformers(theirs):
    assert len(theirs["canvases"]) == 5000 and len({tuple(one) for one in theirs["canvases"].tolist()}) > 40
    assert other_canvases(theirs, best_canvas) == 0


def test_a_wrong_choice_among_equal_canvases_is_noticed(theirs):
    assert other_canvases(theirs, largest_of_equals) > 1000


def test_sizes_on_the_canvas_equal_those_of_transformers(theirs):
    found = np.array([canvas.resized(*size) for size in sizes()])
    assert (found == theirs["scaled"]).all()


def test_sizes_by_python_floats_alone_are_noticed(theirs, monkeypatch):
    monkeypatch.setattr(canvas.np, "float32", float)
    found = np.array([canvas.resized.__wrapped__(*size) for size in sizes()])
    assert (found != theirs["scaled"]).any()


def hash_of_all(ids):
    digest = hashlib.sha256()
    for height, width, config in sizes():
        digest.update(placeholder_ids(best_canvas(height, width, config), config.tokens_per_tile, ids).tobytes())
    return digest.hexdigest()


def test_placeholders_equal_those_of_transformers(theirs):
    assert hash_of_all(IDS) == theirs["ids_sha256"]
    lengths = [placeholder_length(best_canvas(*size), size[2].tokens_per_tile) for size in sizes()]
    assert lengths == theirs["lengths"].tolist()


def test_swapped_separators_are_noticed(theirs):
    assert hash_of_all(dataclasses.replace(IDS, tile_x=IDS.tile_y, tile_y=IDS.tile_x)) != theirs["ids_sha256"]


@pytest.mark.parametrize(
    ("rows", "columns", "tiles", "length"), [(1, 1, 1, 147), (2, 1, 3, 437), (2, 2, 5, 727), (4, 4, 17, 2467)]
)
def test_placeholders_have_the_lengths_of_llama_4(rows, columns, tiles, length):
    one = Canvas(rows, columns)
    ids = placeholder_ids(one, 144, IDS)
    assert (one.tiles, len(ids), placeholder_length(one, 144)) == (tiles, length, length)
    assert (ids == IDS.patch).sum() == one.tiles * 144


def test_placeholders_of_one_row_of_two_tiles():
    patches = [IDS.patch] * 144
    expected = [IDS.start, *patches, IDS.tile_x, *patches, IDS.tile_y, *GLOBAL]
    assert placeholder_ids(Canvas(1, 2), 144, IDS).tolist() == expected


def test_shared_placeholders_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        placeholder_ids(Canvas(1, 1), 144, IDS)[0] = 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_size": 0}, "tile_size=0: must be positive"),
        ({"patch_size": -1}, "patch_size=-1: must be positive"),
        ({"max_tiles": 0}, "max_tiles=0: must be positive"),
        ({"max_tiles": 5000}, "max_tiles=5000: must be at most 1024"),
        ({"tile_size": 350}, "tile_size=350: must be a multiple of 28, .*; try 336"),
        ({"tile_size": 14}, "tile_size=14: must be a multiple of 28, .*; try 28"),
    ],
)
def test_tiles_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TileConfig(**settings)


def test_tokens_of_a_tile():
    assert [TileConfig().tokens_per_tile, TileConfig(28).tokens_per_tile, TileConfig(56, 7).tokens_per_tile] == [
        144,
        1,
        16,
    ]


def test_canvases_need_neither_pillow_nor_torch():
    script = "import sys, data.images.canvas; assert not {'PIL', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
