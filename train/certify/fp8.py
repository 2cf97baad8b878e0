"""Certify FP8: a layout quantises to the same bytes as one process, or the errors of its gradients are similar.

Elements of a tile share a scale. Tiles within a sequence or a weight are the same in every layout whose shards end at
tile edges. Tiles over the tokens of an expert are the same if its matmuls get the same tokens in the same order. If
only matmuls with the same tiles use FP8, the layout is certified in float64 like any other: one different byte would
cause a difference of 1e-4, and the tolerance is 1e-9. If all matmuls use FP8, the error of each gradient (its distance
from the gradient without FP8) may be at most `ERROR` times the error in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from model.config import ModelConfig
from model.roles import Role
from parallel.layout import Layout, ParallelConfig
from precision.config import Backend, Compute, PrecisionConfig, Products, Recipe
from train.certify.compare import Comparison, compare, largest_difference, relative_errors, worst_parameter
from train.certify.worker import CertifyCase, RankResults, RunOnRanks, run_cases
from train.optim.config import OptimizerConfig, OptimizerKind

TILE, SEQUENCES_PER_RANK = 128, 4
"""A rank's part of each size of the model and of a sequence is a multiple of TILE, so that no tile is split."""
LOSS, NORM, ERROR = 5e-3, 5e-2, 1.5
"""Tolerances if tiles differ. LOSS and NORM are relative; ERROR is a gradient's error over that in one process."""
_SMALL = 1e-3
"""Smallest denominator of the ratio for ERROR, so that tiny errors do not count."""
_SAME, _ANY, _UNROUNDED = "FP8 in the same tiles", "FP8", "unrounded"


def compare_fp8(
    model: ModelConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    count: int,
    ranks: RunOnRanks,
    frozen: frozenset[Role] = frozenset(),
) -> Iterator[Comparison]:
    """Compare a layout of `count` ranks with one process that makes the same micro-batches. `model`: shrunk, with sizes
    that are multiples of `TILE`. Raises `RankFailure` if a rank fails.
    """
    cases = {k: replace(one, frozen=frozen) for k, one in _cases(model, precision, parallel.resolve(count)).items()}
    unrounded = replace(cases[_ANY], precision=PrecisionConfig(Compute.float64))
    (wanted,) = ranks(1, run_cases, ParallelConfig(), {**cases, _UNROUNDED: unrounded})
    found = ranks(count, run_cases, parallel, cases)
    if _SAME in cases:
        yield from compare(_SAME, wanted[_SAME], [rank[_SAME] for rank in found], cases[_SAME])
    yield from _no_larger_error(wanted[_UNROUNDED], wanted[_ANY], [rank[_ANY] for rank in found])


def same_tiles(recipe: Recipe, layout: Layout) -> list[Products]:
    """Return the groups of matmuls whose tiles do not depend on the layout.

    An expert gets the same tokens only if all ranks with different tokens send them to the same replica of the expert.
    It gets them in the same order only if ranks hold whole sequences. The scale of a whole tensor or row changes if the
    tensor is split, so under tensorwise and rowwise only pp keeps the tiles.
    """
    if recipe in (Recipe.tensorwise, Recipe.rowwise):
        return list(Products) if layout.world_size == layout.pp else []
    same_tokens = layout.efsdp * layout.dp_replicate * layout.cp == 1
    return [products for products in Products if products is not Products.expert or same_tokens]


def _cases(model: ModelConfig, precision: PrecisionConfig, layout: Layout) -> dict[str, CertifyCase]:
    emulated = replace(precision, backend=Backend.emulated, compute=Compute.float64)
    sgd = OptimizerConfig(kind=OptimizerKind.sgd, lr=0.1, weight_decay=0.0)
    case = CertifyCase(
        model,
        emulated,
        sgd,
        seq_len=2 * TILE * layout.cp,  # under cp a rank holds two parts of a sequence, one of each half
        batch_size=SEQUENCES_PER_RANK * layout.dp,
        emulates=layout.dp,
    )
    same = same_tiles(recipe_of(precision), layout)
    kept = [products for products in precision.fp8_products if products in same]
    same_case = {_SAME: replace(case, precision=replace(emulated, fp8_products=kept))} if kept else {}
    return {**same_case, _ANY: case}


def describe(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the FP8 settings that a certificate covers; other values need another certificate."""
    products = sorted(products.value for products in precision.fp8_products)
    layers = [precision.bf16_first_layers, precision.bf16_last_layers]
    return {"recipe": recipe_of(precision).value, "products": products, "bf16_layers": layers}


def recipe_of(precision: PrecisionConfig) -> Recipe:
    """Return the recipe, with `auto` resolved for the CPU, where certificates are made."""
    return precision.recipe.on(torch.device("cpu"))


def _no_larger_error(exact: RankResults, alone: RankResults, found: Sequence[RankResults]) -> Iterator[Comparison]:
    yield Comparison(f"{_ANY}: loss", largest_difference("loss", alone, found), LOSS)
    yield Comparison(f"{_ANY}: gradient norm", largest_difference("norm", alone, found), NORM)
    usual = relative_errors(exact.gradients, [alone.gradients])
    here = relative_errors(exact.gradients, [results.gradients for results in found])
    ratios = {name: here[name] / max(usual[name], _SMALL) for name in usual}
    yield worst_parameter(f"{_ANY}: error of gradients over one process's", ratios, ERROR)
