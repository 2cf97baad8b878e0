"""Compare the bytes and scales of quantised operands with the recipes' rules, element by element."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from precision.config import Recipe
from precision.fp8_linear import NotFinite, Operand
from precision.fp8_tiles import E4M3, E5M2, Tiling, _microscaling, quantise, tiling
from tests.support.operations import Observed

RECIPES = [recipe for recipe in Recipe if recipe is not Recipe.auto]


def operand(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Draw rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.exp(4 * torch.randn(rows, 1, generator=generator))


def expected_scale(recipe: Recipe, largest: float, amax: float) -> float:
    if recipe is Recipe.mxfp8:
        return 2.0 ** -math.ceil(math.log2(amax / 448)) if amax else 2.0**127
    single = float(torch.tensor(largest) / torch.tensor(amax)) if amax else 1.0
    return 2.0 ** (math.frexp(single)[1] - 1) if recipe is Recipe.blockwise else single


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", Operand)
def test_every_element_follows_the_rules(recipe, kind):
    x, how = operand(150, 300), tiling(recipe, kind)
    x[7] = 0
    found = quantise(x, how)
    rows, columns = min(how.rows, 150), min(how.columns, 300)
    for top in range(0, 150, rows):
        for left in range(0, 300, columns):
            tile = x[top : top + rows, left : left + columns]
            scale = expected_scale(recipe, how.largest, float(tile.abs().max()))
            wanted = (tile * scale).clamp(-how.largest, how.largest).to(how.format)
            data = found.data[top : top + rows, left : left + columns]
            assert torch.equal(data.view(torch.uint8), wanted.view(torch.uint8))
            assert float(found.inverse_scale[top // rows, left // columns]) == pytest.approx(1 / scale, rel=3e-7)


def test_formats_and_tiles_of_the_recipes():
    weight, gradient = tiling(Recipe.blockwise, Operand.weight), tiling(Recipe.blockwise, Operand.gradient)
    assert (weight.rows, weight.columns, gradient.rows, gradient.columns) == (128, 128, 1, 128)
    assert tiling(Recipe.tensorwise, Operand.gradient).format is E5M2
    assert tiling(Recipe.tensorwise, Operand.activation).format is E4M3
    assert {tiling(recipe, Operand.gradient).format for recipe in RECIPES if recipe is not Recipe.tensorwise} == {E4M3}


def test_powers_of_two_are_exact():
    x = torch.exp2(torch.randint(-3, 4, (128, 128), generator=torch.Generator().manual_seed(2)).float())
    for recipe in (Recipe.blockwise, Recipe.mxfp8):
        assert torch.equal(quantise(x, tiling(recipe, Operand.activation)).dequantise(torch.float32), x)


def test_saturation_does_not_rely_on_the_cast():
    """A scale that is rounded up moves the largest element beyond the FP8 range. Torch versions cast it differently."""
    amax = torch.linspace(0.1, 10, 9973)
    assert float((amax * (448 / amax)).max()) > 448
    cast: list[float] = []

    def see(function: Any, arguments: Any, options: dict[str, Any]) -> None:
        if options.get("dtype") in (E4M3, E5M2):
            cast.append(float(arguments[0].abs().max()))

    with Observed(see):
        quantise(amax[:, None], tiling(Recipe.rowwise, Operand.activation))
    assert max(cast) == 448


def test_scales_at_the_edges_of_float32_and_of_exponents():
    largest = torch.finfo(torch.float32).max
    tiny = torch.tensor([1e-40, 0.0])
    assert Tiling(1, 128).scale(tiny)[0].tolist() == [largest, 1.0]
    assert Tiling(1, 128, powers_of_two=True).scale(tiny)[0].tolist() == [2.0**127, 1.0]
    ratios = [1.0, 1.25, 1.5 * 2.0**127, 2.0**-127, 2.0**-130, 1.5 * 2.0**-127, 0.0]
    wanted = [1.0, 2.00, 2.0**127, 2.0**-127, 2.0**-127, 2.0**-126, 2.0**-127]
    scale, inverse = _microscaling(torch.tensor(ratios))
    assert inverse.tolist() == wanted and scale.tolist() == [1 / one for one in wanted]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_inf_and_nan_are_rejected(recipe, bad):
    x = operand(32, 64)
    x[3, 5] = bad
    with pytest.raises(NotFinite):
        quantise(x, tiling(recipe, Operand.activation))


@pytest.mark.parametrize("tile", [Tiling(1, 128), Tiling(1, 128, powers_of_two=True), Tiling(1, 32, exponents=True)])
def test_unchecked_inf_becomes_nan(tile):
    """On a GPU, inf is not rejected, to avoid a synchronisation. It must become NaN: saturation would hide it."""
    scale, inverse = tile.scale(torch.tensor([1.0, torch.inf, torch.nan]))
    assert torch.isfinite(scale).tolist() == torch.isfinite(inverse).tolist() == [True, False, False]


@pytest.mark.parametrize("tiny", [1e-44, 1e-38, 1e-30, 0.0])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tiny_numbers_stay_finite(recipe, tiny):
    x = torch.full((32, 64), tiny)
    wide = quantise(x, tiling(recipe, Operand.activation)).dequantise(torch.float64)
    assert torch.isfinite(wide).all() and float(wide.abs().max()) <= tiny * 1.1 + 1e-44
