"""Stand in for an FP8 library, to count its calls on meta tensors."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precision.config import Recipe
from precision.fp8_linear import Operand
from precision.gemm import Groups


@dataclass(frozen=True)
class Shell:
    """An operand of which only the shape is known, with the tensors of its rows and columns, one byte per element."""

    shape: torch.Size
    parts: tuple[Tensor | None, ...]

    def only_columns(self) -> Shell:
        return Shell(self.shape, self.parts[-1:])

    def tensors(self) -> list[Tensor | None]:
        return list(self.parts)

    def restored(self, tensors: Sequence[Tensor | None]) -> Shell:
        return Shell(self.shape, tuple(tensors))


class Float8Calls:
    """An FP8 library that computes nothing: `precision.fp8_linear.Arithmetic` with the shapes of the blockwise recipe.
    `quantised` [operand] and `products` count its calls. Transformer Engine's backend turns each into one call of its
    library, whatever the number of experts (tests/precision). Like that backend, it reads the counts of experts on the
    host.
    """

    compute_dtype = torch.bfloat16
    token_multiple, joint_multiple = Recipe.blockwise.multiple, Recipe.blockwise.joint_multiple

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.quantised: Counts[Operand] = Counts()
        self.products = 0

    def quantise(self, x: Tensor, operand: Operand, groups: Groups | None, rows: bool, columns: bool) -> Shell:
        self.quantised[operand] += 1
        if groups is not None:
            assert groups.host
        return Shell(x.shape, tuple(torch.empty_like(x, dtype=torch.uint8) for _ in range(rows + columns)))

    def forward(self, x: Shell, w: Shell, groups: Groups | None) -> Tensor:
        return self._product(x, x.shape[0], w.shape[-2])

    def input_gradient(self, grad: Shell, w: Shell, groups: Groups | None) -> Tensor:
        return self._product(grad, grad.shape[0], w.shape[-1])

    def weight_gradient(self, grad: Shell, x: Shell, groups: Groups | None) -> Tensor:
        experts = [] if groups is None else [len(groups.counts_E)]
        return self._product(grad, *experts, grad.shape[-1], x.shape[-1])

    def _product(self, operand: Shell, *shape: int) -> Tensor:
        self.products += 1
        part = next(part for part in operand.parts if part is not None)
        return part.new_empty(shape, dtype=self.compute_dtype)
