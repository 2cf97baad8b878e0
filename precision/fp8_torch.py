"""FP8 by PyTorch's `scaled_mm`, on GPUs and, for some recipes, on the CPU. Needs no other library.

Experts are multiplied one by one, with their token counts on the host, because torch has no grouped FP8 matmul for most
recipes. This is correct but slow; Transformer Engine is the backend for experts. The blockwise recipe needs Hopper.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import first_line
from precision.config import Recipe
from precision.fp8_linear import LARGEST_ERROR, Operand
from precision.fp8_tiles import QuantisedRows, TiledArithmetic, quantise, tiling

RECIPES: tuple[Recipe, ...] = (Recipe.blockwise, Recipe.tensorwise, Recipe.rowwise)
EXPERTS = "experts are multiplied one by one, which is slow: precision.backend=te multiplies them in one call"


class TorchFloat8(TiledArithmetic):
    def multiply(self, a: QuantisedRows, b: QuantisedRows) -> Tensor:
        a_scale, a_kind = _scale(a)
        b_scale, b_kind = _scale(b)
        product: Any = F.scaled_mm  # type: ignore[attr-defined]
        kinds = a_kind, b_scale.t() if b_scale.dim() == 2 else b_scale, b_kind
        return product(a.data, b.data.t(), a_scale, *kinds, output_dtype=self.compute_dtype)


def _scale(rows: QuantisedRows) -> tuple[Tensor, Any]:
    """Return the inverse scales in the kernels' layout, and their scaling type."""
    kinds: Any = F.ScalingType  # type: ignore[attr-defined]
    scale, how = rows.inverse_scale, rows.tiling
    if how.rows == 128:
        # cuBLAS needs each row of these scales padded to a multiple of four
        return F.pad(scale, (0, -scale.shape[1] % 4)), kinds.BlockWise128x128
    if how.columns == 128:
        return scale.t().contiguous().t(), kinds.BlockWise1x128
    return (scale, kinds.RowWise) if how.rows == 1 else (scale.reshape(1), kinds.TensorWise)


arithmetic = TorchFloat8


def unavailable(recipe: Recipe, device: torch.device) -> list[str]:
    if not hasattr(F, "scaled_mm"):
        return [f"torch {torch.__version__} has no torch.nn.functional.scaled_mm: install a newer one"]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return [f"{torch.cuda.get_device_name(device)} has no FP8 units: compute capability 8.9 is needed"]
    return [problem] if (problem := _trial_failure(recipe, str(device))) else []


@cache
def _trial_failure(recipe: Recipe, device: str) -> str | None:
    """Try a small matmul of each kind on this device. Return the first failure, or None if all results are right."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, 256, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    multiply = arithmetic(recipe, torch.bfloat16).multiply
    for left, right in (
        (Operand.activation, Operand.weight),
        (Operand.gradient, Operand.weight),
        (Operand.gradient, Operand.activation),
    ):
        a, b = quantise(x, tiling(recipe, left)), quantise(y, tiling(recipe, right))
        try:
            found = multiply(a, b).float()
        except Exception as error:  # NotImplementedError, RuntimeError or ValueError
            return f"torch {torch.__version__} rejects {left.value} x {right.value} on {device}: {first_line(error)}"
        wanted = a.dequantise(torch.float32) @ b.dequantise(torch.float32).t()
        distance = float((found - wanted).norm() / wanted.norm())
        if not distance < LARGEST_ERROR:
            return f"{version()} computes {left.value} x {right.value} wrongly on {device}: off by {distance:.1e}"
    return None


def version() -> str:
    return f"torch {torch.__version__}"
