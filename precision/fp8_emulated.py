"""An emulation of every FP8 recipe on any device: the bytes of Transformer Engine, products of what they stand for.

What a GPU's kernels do differently is only the order and width of their sums. It is for tests and certificates; it is
slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from precision.config import Recipe
from precision.fp8_linear import Float8Gemm
from precision.fp8_tiles import QuantisedRows, TiledArithmetic
from precision.gemm import GemmBackend, at_least_float32

RECIPES: tuple[Recipe, ...] = (Recipe.blockwise, Recipe.tensorwise, Recipe.rowwise, Recipe.mxfp8)


class EmulatedArithmetic(TiledArithmetic):
    """Products in float32, float64 where that is the compute format. What is not finite is an error on every device."""

    waits = True

    def multiply(self, a: QuantisedRows, b: QuantisedRows) -> Tensor:
        wide = at_least_float32(self.compute_dtype)
        return (a.wide(wide) @ b.wide(wide).t()).to(self.compute_dtype)


def unavailable(recipe: Recipe, device: torch.device) -> list[str]:
    return []


def version() -> str:
    return "the reference"


def make(recipe: Recipe, compute_dtype: torch.dtype, where: str) -> GemmBackend:
    return Float8Gemm(EmulatedArithmetic(recipe, compute_dtype), compute_dtype, where)
