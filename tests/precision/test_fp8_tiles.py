"""Bytes and scales of quantised operands against the rules, one element at a time."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from precision.config import Recipe
from precision.fp8_linear import NotFinite, Operand
from precision.fp8_tiles import E4M3, E5M2, QuantisedRows, Tiling, _microscaling, quantise, tiling

RECIPES = [recipe for recipe in Recipe if recipe is not Recipe.auto]


def operand(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of very different magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.exp(4 * torch.randn(rows, 1, generator=generator))


def power_below(value: float) -> float:
    """The float32 `value` with a mantissa of 0."""
    (bits,) = struct.unpack("I", struct.pack("f", value))
    (cut,) = struct.unpack("f", struct.pack("I", bits & 0x7F800000))
    return float(cut)


def expected_scale(recipe: Recipe, largest: float, amax: float) -> float:
    if recipe is Recipe.mxfp8:
        return 2.0 ** -math.ceil(math.log2(amax / 448)) if amax else 2.0**127
    single = float(torch.tensor(largest) / torch.tensor(amax)) if amax else 1.0
    return power_below(single) if recipe is Recipe.blockwise else single


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", Operand)
def test_every_element_follows_the_rules(recipe: Recipe, kind: Operand) -> None:
    x, how = operand(150, 300), tiling(recipe, kind)
    x[7] = 0
    found = quantise(x, how)
    rows, columns = min(how.rows, 150), min(how.columns, 300)
    for top in range(0, 150, rows):
        for left in range(0, 300, columns):
            tile = x[top : top + rows, left : left + columns]
            scale = expected_scale(recipe, how.largest, float(tile.abs().max()))
            wanted = (tile * scale).clamp(-how.largest, how.largest).to(how.format)
            assert torch.equal(
                found.data[top : top + rows, left : left + columns].view(torch.uint8), wanted.view(torch.uint8)
            )
            assert float(found.inverse_scale[top // rows, left // columns]) == pytest.approx(1 / scale, rel=3e-7)


def test_formats_and_tiles_of_the_recipes() -> None:
    weight, gradient = tiling(Recipe.blockwise, Operand.weight), tiling(Recipe.blockwise, Operand.gradient)
    assert (weight.rows, weight.columns, gradient.rows, gradient.columns) == (128, 128, 1, 128)
    assert tiling(Recipe.tensorwise, Operand.gradient).format is E5M2
    assert tiling(Recipe.tensorwise, Operand.activation).format is E4M3
    assert {tiling(recipe, Operand.gradient).format for recipe in RECIPES if recipe is not Recipe.tensorwise} == {E4M3}


@pytest.mark.parametrize("recipe", RECIPES)
def test_dequantised_values_are_close(recipe: Recipe) -> None:
    x = 1 + 9 * torch.rand(64, 256, generator=torch.Generator().manual_seed(1))  # nothing underflows
    error = (quantise(x, tiling(recipe, Operand.activation)).dequantise(torch.float64) - x).abs() / x.abs()
    assert float(error.max()) <= 1 / 16 + 1e-6  # half a unit of three bits


def test_powers_of_two_are_exact() -> None:
    x = torch.exp2(torch.randint(-3, 4, (128, 128), generator=torch.Generator().manual_seed(2)).float())
    for recipe in (Recipe.blockwise, Recipe.mxfp8):
        assert torch.equal(quantise(x, tiling(recipe, Operand.activation)).dequantise(torch.float32), x)


class Cast(TorchDispatchMode):
    """Records the largest value cast to FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if (options or {}).get("dtype") in (E4M3, E5M2):
            self.largest = max(self.largest, float(arguments[0].abs().max()))
        return function(*arguments, **(options or {}))


def test_saturation_does_not_rely_on_the_cast() -> None:
    """A scale rounded up moves the largest element beyond the FP8 range. Versions of torch cast it differently."""
    amax = torch.linspace(0.1, 10, 9973)
    assert float((amax * (448 / amax)).max()) > 448
    with Cast() as cast:
        quantise(amax[:, None], tiling(Recipe.rowwise, Operand.activation))
    assert cast.largest == 448


def test_scales_at_the_edges_of_float32() -> None:
    largest = torch.finfo(torch.float32).max
    tiny = torch.tensor([1e-40, 0.0])
    assert Tiling(1, 128).scale(tiny)[0].tolist() == [largest, 1.0]
    assert Tiling(1, 128, powers_of_two=True).scale(tiny)[0].tolist() == [2.0**127, 1.0]


@pytest.mark.parametrize(
    "ratio, inverse",
    [
        (1.0, 1.0),
        (1.25, 2.0),
        (1.5 * 2.0**127, 2.0**127),
        (2.0**-127, 2.0**-127),
        (2.0**-130, 2.0**-127),
        (1.5 * 2.0**-127, 2.0**-126),
        (0.0, 2.0**-127),
    ],
)
def test_exponents_round_up_within_their_range(ratio: float, inverse: float) -> None:
    scale, found = _microscaling(torch.tensor([ratio]))
    assert found.tolist() == [inverse] and scale.tolist() == [1 / inverse]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_inf_and_nan_are_rejected(recipe: Recipe, bad: float) -> None:
    x = operand(32, 64)
    x[3, 5] = bad
    with pytest.raises(NotFinite):
        quantise(x, tiling(recipe, Operand.activation))


@pytest.mark.parametrize("tile", [Tiling(1, 128), Tiling(1, 128, powers_of_two=True), Tiling(1, 32, exponents=True)])
def test_unchecked_inf_becomes_nan(tile: Tiling) -> None:
    """On a GPU, where nothing synchronises; saturation would hide the overflow."""
    scale, inverse = tile.scale(torch.tensor([1.0, torch.inf, torch.nan]))
    assert torch.isfinite(scale).tolist() == torch.isfinite(inverse).tolist() == [True, False, False]


@pytest.mark.parametrize("tiny", [1e-44, 1e-38, 1e-30, 0.0])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tiny_numbers_stay_finite(recipe: Recipe, tiny: float) -> None:
    x = torch.full((32, 64), tiny)
    wide = quantise(x, tiling(recipe, Operand.activation)).dequantise(torch.float64)
    assert torch.isfinite(wide).all() and float(wide.abs().max()) <= tiny * 1.1 + 1e-44


def cut(rows: QuantisedRows, down: slice, across: slice) -> QuantisedRows:
    how = rows.tiling
    scale = rows.inverse_scale[slice(down.start // how.rows, down.stop // how.rows)]
    scale = scale[:, slice(across.start // how.columns, across.stop // how.columns)]
    return QuantisedRows(rows.data[down, across], scale, how)


@pytest.mark.parametrize("kind", Operand)
@pytest.mark.parametrize("recipe", [Recipe.blockwise, Recipe.mxfp8])
def test_shards_of_whole_tiles_have_the_same_bytes(recipe: Recipe, kind: Operand) -> None:
    x, how = operand(256, 512), tiling(recipe, kind)
    down, across = slice(128, 256), slice(128, 384)
    whole, part = cut(quantise(x, how), down, across), quantise(x[down, across], how)
    assert torch.equal(whole.data.view(torch.uint8), part.data.view(torch.uint8))
    assert torch.equal(whole.inverse_scale, part.inverse_scale)


def test_shards_that_cut_tiles_differ() -> None:
    x, how = operand(256, 512), tiling(Recipe.tensorwise, Operand.weight)
    x[200, 500] = 1e9
    part = quantise(x[:128], how)
    assert not torch.equal(quantise(x, how).data[:128].view(torch.uint8), part.data.view(torch.uint8))
