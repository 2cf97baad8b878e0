"""Count the operations that each recomputation mode repeats."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.layouts import tiny
from model.config import ModelConfig
from parallel.layout import ParallelConfig, Recompute
from precision.config import Backend, Compute, PrecisionConfig, Recipe
from tests.support.models import placed_here
from tests.support.operations import Observed
from tests.support.tiny import synthetic
from train.certify.plan import shrink
from train.certify.worker import BATCH_SIZE
from train.optim.config import OptimizerConfig

KINDS = {
    "products": ("mm", "_grouped_mm", "_linear_pointwise"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "cheap": ("silu",),
}


def operations(mode: Recompute, precision: PrecisionConfig, model: ModelConfig) -> Counter[str]:
    """Count the operations of one step in one process, by name."""
    placed = placed_here(model, ParallelConfig(recompute=mode), precision)
    _, _, step = synthetic(placed, OptimizerConfig(), BATCH_SIZE)
    names: list[str] = []
    with Observed(lambda function, *_: names.append(function.overloadpacket.__name__)):
        step()
    return Counter(names)


def test_selective_recomputation_repeats_no_product_in_float8():
    eight = PrecisionConfig(Compute.bfloat16, backend=Backend.torch, recipe=Recipe.rowwise)
    times = [operations(mode, eight, shrink(tiny(1), side=16))["_scaled_mm_v2"] for mode in Recompute]
    none, selective, full = times
    assert 0 < none == selective < full


@pytest.fixture(scope="module", params=[Compute.float32, Compute.bfloat16], ids=lambda compute: compute.value)
def times(request) -> dict[Recompute, Counter[str]]:
    return {mode: operations(mode, PrecisionConfig(request.param), tiny(2)) for mode in Recompute}


@pytest.mark.parametrize("kind", KINDS)
def test_selective_recomputation_repeats_only_what_is_cheap(times, kind):
    none, selective, full = (sum(times[mode][name] for name in KINDS[kind]) for mode in Recompute)
    assert 0 < none < full and selective == (full if kind == "cheap" else none)
