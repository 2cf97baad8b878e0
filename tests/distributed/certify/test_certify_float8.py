"""FP8 under layouts: the same bytes as in one process if no tile is split, else no larger error. Bugs are caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.layouts import FLOAT8, LAYOUTS, tiny
from parallel.layout import ParallelConfig
from precision.config import Backend, Compute, PrecisionConfig, Products, Recipe
from tests.distributed.certify.test_certify import config
from tests.support.bugs import BuggyRanks
from train.certify.compare import EXACT, Comparison
from train.certify.fp8 import ERROR, LOSS, NORM, TILE, compare_fp8, same_tiles
from train.certify.plan import shrink, techniques

SAME_TILES = ("ep2", "tp2 + ep2", "pp2 zbv")
"""Layouts in which every matmul has the same tiles as in one process."""


def certified(ranks: Any, name: str, recipe: Recipe, bug: str | None = None) -> list[Comparison]:
    count, parallel = LAYOUTS[name]
    precision = PrecisionConfig(Compute.bfloat16, backend=Backend.te, recipe=recipe)  # certified by the emulation
    return list(compare_fp8(shrink(tiny(1), parallel, TILE), precision, parallel, count, BuggyRanks(ranks, bug)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FLOAT8, "etp2"])
def test_blockwise_bytes_are_those_of_one_process(ranks, name):
    found = certified(ranks, name, Recipe.blockwise)
    assert all(one.passed for one in found), [(one.name, one.largest) for one in found if not one.passed]
    exact = [one for one in found if one.gate == EXACT]
    assert len(exact) == 10 and max(one.largest for one in exact) < 1e-13
    assert [one.gate for one in found if one.gate != EXACT] == [LOSS, NORM, ERROR]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [Recipe.tensorwise, Recipe.rowwise, Recipe.mxfp8])
@pytest.mark.parametrize("name", SAME_TILES)
def test_other_recipes_make_no_larger_error(ranks, name, recipe):
    found = certified(ranks, name, recipe)
    assert all(one.passed for one in found), [(one.name, one.largest) for one in found if not one.passed]
    kept = recipe is Recipe.mxfp8 or name.startswith("pp2")
    assert any(one.gate == EXACT for one in found) == kept


BLAMED = {
    "tiles_across_experts": "FP8 in the same tiles: gradients",
    "padding_that_is_not_zero": "FP8 in the same tiles: gradients",
    "weights_quantised_before_they_are_whole": "FP8 in the same tiles: loss",
    "doubled_divide": "FP8: error of gradients over one process's",
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BLAMED)
def test_different_bytes_are_detected(ranks, bug):
    failed = {one.name for one in certified(ranks, "ep2", Recipe.blockwise, bug) if not one.passed}
    assert BLAMED[bug] in failed, failed


def test_which_products_have_the_same_tiles():
    def kept(recipe: Recipe, count: int, parallel: ParallelConfig) -> list[Products]:
        return same_tiles(recipe, parallel.resolve(count))

    for name in SAME_TILES:
        assert Products.expert in kept(Recipe.blockwise, *LAYOUTS[name])
    others = [(2, ParallelConfig(dp_replicate=2)), (2, ParallelConfig(cp=2, ep=2))]
    for layout in ((2, ParallelConfig()), (4, ParallelConfig(ep=2)), (2, ParallelConfig(tp=2)), *others):
        found = kept(Recipe.blockwise, *layout)
        assert Products.attention in found and Products.expert not in found
    assert (LOSS, NORM, ERROR) == (5e-3, 5e-2, 1.5)  # wider tolerances would let bugs through
    assert kept(Recipe.tensorwise, 2, ParallelConfig(ep=2)) == [] != kept(Recipe.tensorwise, 2, ParallelConfig(pp=2))


def test_a_certificate_covers_its_recipe():
    eight = config("precision=fp8", "precision.recipe=mxfp8")

    def said(precision: PrecisionConfig | None) -> Any:
        return techniques(eight.parallel, eight.optimizer.kind, precision)["float8"]

    usual = PrecisionConfig(Compute.bfloat16, backend=Backend.emulated)
    assert said(eight.precision)["recipe"] == "mxfp8" and said(usual)["recipe"] == "blockwise" and said(None) is None
    for other in ({"fp8_products": [Products.attention]}, {"bf16_first_layers": 1}, {"bf16_last_layers": 1}):
        assert said(replace(usual, **other)) != said(usual)
    assert said(replace(usual, backend=Backend.te)) == said(usual)
