"""Which matrices FP8 can take is asked of the shapes that each rank computes with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from core.errors import ConfigError
from model.config import ModelConfig
from parallel.layout import ParallelConfig
from parallel.parallelize import check_float8
from precision.config import Backend, Compute, PrecisionConfig, Products, Recipe

MODEL = ModelConfig(vocab_size=64, width=64, layers=4, heads=4, kv_heads=4, head_width=16, dense_width=96,
                    expert_width=48, shared_width=64, experts=4, moe_every=2, chunk=16)  # fmt: skip
EIGHT = PrecisionConfig(Compute.bfloat16, backend=Backend.reference)


def checked(ranks: int = 1, model: ModelConfig = MODEL, precision: PrecisionConfig = EIGHT, **degrees: Any) -> str:
    try:
        check_float8(model, precision, ParallelConfig(**degrees).resolve(ranks))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_rank_has_parts_of_matrices() -> None:
    assert checked() == checked(2, tp=2) == checked(2, ep=2) == checked(2, pp=2) == ""
    assert "the dense_gate of layer 0 is 24 x 64 on a rank, but blockwise" in checked(4, tp=4)
    assert "the expert_gate_up of layer 1 is 24 x 64 on a rank" in checked(2, etp=2)
    narrow = replace(EIGHT, recipe=Recipe.mxfp8)
    assert "the query of layer 0 is 16 x 64 on a rank, but mxfp8 takes" in checked(4, precision=narrow, tp=4)


def test_what_stays_wide_may_have_any_shape() -> None:
    odd = replace(MODEL, dense_width=100)
    assert "the dense_gate of layer 0 is 100 x 64" in checked(model=odd)
    assert checked(model=odd, precision=replace(EIGHT, float8=[Products.attention, Products.expert])) == ""
    first = replace(MODEL, dense_width=100, moe_every=4)  # layers 0 to 2 are dense
    assert "layer 2" in checked(model=first, precision=replace(EIGHT, bf16_first_layers=2))
    assert checked(model=first, precision=replace(EIGHT, bf16_first_layers=3)) == ""
    assert checked(model=odd, precision=PrecisionConfig()) == ""


@pytest.mark.parametrize("first, last, key", [(4, 0, "first"), (0, 4, "last"), (2, 2, "last"), (9, 1, "first")])
def test_some_layer_must_be_left(first: int, last: int, key: str) -> None:
    said = checked(precision=replace(EIGHT, bf16_first_layers=first, bf16_last_layers=last))
    assert said.startswith(f"precision.bf16_{key}_layers=") and "leaves none of the 4 layers" in said
    assert checked(precision=replace(EIGHT, bf16_first_layers=1, bf16_last_layers=2)) == ""


def test_some_product_must_be_there() -> None:
    dense = replace(MODEL, moe_every=0)
    said = checked(model=dense, precision=replace(EIGHT, float8=[Products.expert]))
    assert said == "precision.float8: names expert, of which this model has none"
