"""Emulate every FP8 recipe on any device, slowly, for tests and certificates.

Operands are quantised to the same bytes as by Transformer Engine, which lacks rowwise. The numbers that the bytes
represent are multiplied. GPU kernels differ from the emulation only in the order and precision of their sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from precision.config import Recipe
from precision.fp8_tiles import QuantisedRows, TiledArithmetic
from precision.gemm import at_least_float32

RECIPES: tuple[Recipe, ...] = (Recipe.blockwise, Recipe.tensorwise, Recipe.rowwise, Recipe.mxfp8)
EXPERTS = ""


class EmulatedArithmetic(TiledArithmetic):
    """Multiplies in at least float32. inf and NaN raise `NotFinite` on every device."""

    checks_on_gpu = True

    def multiply(self, a: QuantisedRows, b: QuantisedRows) -> Tensor:
        wide = at_least_float32(self.compute_dtype)
        return (a.dequantise(wide) @ b.dequantise(wide).t()).to(self.compute_dtype)


arithmetic = EmulatedArithmetic


def unavailable(recipe: Recipe, device: torch.device) -> list[str]:
    return []


def version() -> str:
    return "emulation"
