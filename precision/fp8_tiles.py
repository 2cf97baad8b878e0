"""Quantise to FP8 in tiles with one scale each, in plain PyTorch, to the same bytes and scales as Transformer Engine.

Columns are quantised as the rows of the transposed operand, so each matmul is a b^T. Values are clamped before the
cast, because torch versions differ in how they cast values beyond the FP8 range.

Shapes: R rows, K contracted elements, N rows of the other operand; tiles have r x k elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from precision.config import Recipe
from precision.fp8_linear import NotFinite, Operand
from precision.gemm import Groups

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WHOLE = 1 << 62
"""Tile side that spans the whole operand."""


@dataclass(frozen=True)
class Tiling:
    """Tiles of `rows` x `columns` elements (the last dimension is contracted), in one FP8 format."""

    rows: int
    columns: int
    format: torch.dtype = E4M3
    powers_of_two: bool = False
    exponents: bool = False
    """Inverse scales are E8M0 (OCP Microscaling Formats): exponents only, rounded up."""

    @property
    def largest(self) -> float:
        return torch.finfo(self.format).max

    def scale(self, amax: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale of each tile, which multiplies its elements, and the inverse scale, both float32. `amax`:
        the largest absolute value of each tile.

        As in Transformer Engine, the scale is the largest FP8 number divided by `amax`, rounded down to a power of two
        if `powers_of_two`. It is 1 if `amax` is 0, and the largest float32 if the quotient overflows. Unlike in
        Transformer Engine, it is NaN if `amax` is inf or NaN, which saturation would hide.
        """
        if self.exponents:
            return _microscaling(amax * torch.tensor(1 / self.largest, dtype=torch.float32))
        scale = torch.where(amax > 0, (self.largest / amax).clamp(max=torch.finfo(torch.float32).max), 1.0)
        if self.powers_of_two:
            scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
        scale = scale.where(torch.isfinite(amax), torch.nan)
        return scale, 1 / scale


def _microscaling(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and inverse. The inverse is the smallest power of two from 2^-127 to 2^127 that is >= `ratio`."""
    bits = ratio.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    tiny = (exponent == 0) & (mantissa <= 0x400000)  # up to 2^-127
    biased = exponent + ((mantissa > 0) & (exponent != 254) & ~tiny)
    scale, inverse = _power(254 - biased), _power(biased)
    finite = torch.isfinite(ratio)
    return scale.where(finite, torch.nan), inverse.where(finite, torch.nan)


def _power(biased: Tensor) -> Tensor:
    """Return 2^(biased - 127), exact for `biased` from 0 to 254; 2^-127 is subnormal."""
    return torch.where(biased > 0, biased << 23, 0x400000).to(torch.int32).view(torch.float32)


def tiling(recipe: Recipe, operand: Operand) -> Tiling:
    if recipe is Recipe.blockwise:
        return Tiling(128 if operand is Operand.weight else 1, 128, powers_of_two=True)
    if recipe is Recipe.tensorwise:
        return Tiling(WHOLE, WHOLE, E5M2 if operand is Operand.gradient else E4M3)
    if recipe is Recipe.rowwise:
        return Tiling(1, WHOLE)
    assert recipe is Recipe.mxfp8
    return Tiling(1, 32, exponents=True)


@dataclass(frozen=True)
class QuantisedRows:
    """FP8 numbers [..., R, K] and the inverse scale of each tile."""

    data: Tensor
    inverse_scale: Tensor
    tiling: Tiling

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the bytes represent."""
        tiles = _tiles(self.data.to(dtype), self.tiling)
        return _untiled(tiles * _over(self.inverse_scale.to(dtype)), self.data.shape)


def quantise(x: Tensor, how: Tiling, checks_on_gpu: bool = False) -> QuantisedRows:
    """Quantise the last two dimensions of `x` in tiles; tiles at the edges may be smaller.

    Raises `NotFinite` for inf or NaN on the CPU and, with `checks_on_gpu`, on a GPU, where the check synchronises.
    Without the check, the whole tile becomes NaN.
    """
    tiles = _tiles(x.float(), how)
    amax = tiles.abs().amax(dim=(-3, -1)) if x.numel() else tiles.new_zeros(*tiles.shape[:-3], tiles.shape[-2])
    if (checks_on_gpu or amax.is_cpu) and not torch.isfinite(amax).all():
        raise NotFinite
    scale, inverse = how.scale(amax)
    data = (tiles * _over(scale)).clamp_(-how.largest, how.largest).to(how.format)
    return QuantisedRows(_untiled(data, x.shape), inverse, how)


def _tiles(x: Tensor, how: Tiling) -> Tensor:
    """Reshape [..., R, K] to [..., R / r, r, K / k, k], zero-padding the last tiles."""
    count, length = x.shape[-2:]
    r, k = min(how.rows, max(count, 1)), min(how.columns, max(length, 1))
    below, right = -count % r, -length % k
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    return x.unflatten(-1, (-(-length // k), k)).unflatten(-3, (-(-count // r), r))


def _untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()


def _over(scale: Tensor) -> Tensor:
    """Reshape scales [..., R / r, K / k], so that they broadcast over tiles."""
    return scale[..., :, None, :, None]


@dataclass(frozen=True)
class Tiled:
    """An operand quantised along its rows, columns or both: one matrix, or one per expert. `count`: number of rows."""

    count: int
    rows: tuple[QuantisedRows, ...] = ()
    columns: tuple[QuantisedRows, ...] = ()

    def only_columns(self) -> Tiled:
        return Tiled(self.count, (), self.columns)

    def tensors(self) -> list[Tensor | None]:
        return [tensor for part in (*self.rows, *self.columns) for tensor in (part.data, part.inverse_scale)]

    def restored(self, tensors: Sequence[Tensor | None]) -> Tiled:
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        shells: list[Any] = [*self.rows, *self.columns]
        parts = [replace(old, data=d, inverse_scale=s) for old, (d, s) in zip(shells, pairs, strict=True)]
        return Tiled(self.count, tuple(parts[: len(self.rows)]), tuple(parts[len(self.rows) :]))


class TiledArithmetic:
    """`precision.fp8_linear.Arithmetic` on tiles. Subclasses implement `multiply`, the product of two matrices."""

    checks_on_gpu = False
    """Whether inf and NaN raise on a GPU too, at the cost of a synchronisation."""

    def __init__(self, recipe: Recipe, compute_dtype: torch.dtype) -> None:
        self.recipe, self.compute_dtype = recipe, compute_dtype
        self.token_multiple, self.joint_multiple = recipe.multiple, recipe.joint_multiple

    def multiply(self, a: QuantisedRows, b: QuantisedRows) -> Tensor:
        """Return a b^T in the compute dtype: [R, N] from [R, K] and [N, K]. No dimension is 0."""
        raise NotImplementedError

    def quantise(self, x: Tensor, operand: Operand, groups: Groups | None, rows: bool, columns: bool) -> Tiled:
        def quantised(whole: Tensor, split: Callable[[Tensor], Sequence[Tensor]]) -> tuple[QuantisedRows, ...]:
            """Quantise everything at once, then split it. This is valid because no two parts share a scale."""
            found = quantise(whole, how, self.checks_on_gpu)
            pairs = zip(split(found.data), split(found.inverse_scale), strict=True)
            return tuple(QuantisedRows(data, scale, how) for data, scale in pairs)

        how = tiling(self.recipe, operand)
        if groups is None:
            stack = x if x.dim() == 3 else x[None]
            along = quantised(stack, torch.unbind) if rows else ()
            return Tiled(len(x), along, quantised(stack.mT, torch.unbind) if columns else ())
        used = x[: sum(groups.host)]
        parts = used.split(groups.host)
        if how.rows == 1:
            along = quantised(used, lambda tensor: tensor.split(groups.host)) if rows else ()
        else:
            along = tuple(quantise(part, how, self.checks_on_gpu) for part in parts) if rows else ()
        across = tuple(quantise(part.mT, how, self.checks_on_gpu) for part in parts) if columns else ()
        return Tiled(len(x), along, across)

    def forward(self, x: Tiled, w: Tiled, groups: Groups | None) -> Tensor:
        return self._row_products(x, w.rows, groups)

    def input_gradient(self, grad: Tiled, w: Tiled, groups: Groups | None) -> Tensor:
        return self._row_products(grad, w.columns, groups)

    def weight_gradient(self, grad: Tiled, x: Tiled, groups: Groups | None) -> Tensor:
        products = [self._product(a, b) for a, b in zip(grad.columns, x.columns, strict=True)]
        return products[0] if groups is None else torch.stack(products)

    def _row_products(self, x: Tiled, matrices: Sequence[QuantisedRows], groups: Groups | None) -> Tensor:
        products = [self._product(a, b) for a, b in zip(x.rows, matrices, strict=True)]
        if groups is None:
            return products[0]
        beyond = products[0].new_zeros(x.count - sum(groups.host), products[0].shape[1])
        return torch.cat([*products, beyond])

    def _product(self, a: QuantisedRows, b: QuantisedRows) -> Tensor:
        (count, length), other = a.data.shape, b.data.shape[0]
        if not (count and length and other):
            return a.data.new_zeros(count, other, dtype=self.compute_dtype)
        return self.multiply(a, b)
