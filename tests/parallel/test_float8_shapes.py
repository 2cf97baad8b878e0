"""The shape limits of FP8 are checked with the shards that each rank computes with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from core.errors import ConfigError
from model.config import ModelConfig
from parallel.layout import ParallelConfig
from parallel.parallelize import check_float8
from precision.config import Backend, Compute, PrecisionConfig, Products, Recipe

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
WIDE = {"dense_hidden_size": 96, "expert_hidden_size": 48, "shared_expert_hidden_size": 64}
MODEL = ModelConfig(**SIZES, **WIDE, num_experts=4, moe_every=2, attention_chunk_size=16)
EIGHT = PrecisionConfig(Compute.bfloat16, backend=Backend.emulated)


def checked(ranks: int = 1, model: ModelConfig = MODEL, precision: PrecisionConfig = EIGHT, **degrees: Any) -> str:
    try:
        check_float8(model, precision, ParallelConfig(**degrees).resolve(ranks))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_rank_has_shards_of_matrices():
    assert checked() == checked(2, tp=2) == checked(2, ep=2) == checked(2, pp=2) == ""
    assert "the dense_gate of layer 0 is 24 x 64 on a rank, but blockwise" in checked(4, tp=4)
    assert "the expert_gate_up of layer 1 is 24 x 64 on a rank" in checked(2, etp=2)
    narrow = replace(EIGHT, recipe=Recipe.mxfp8)
    assert "the query of layer 0 is 16 x 64 on a rank, but mxfp8 takes" in checked(4, precision=narrow, tp=4)


def test_unquantised_matrices_may_have_any_shape():
    odd = replace(MODEL, dense_hidden_size=100)
    assert "the dense_gate of layer 0 is 100 x 64" in checked(model=odd)
    assert checked(model=odd, precision=replace(EIGHT, fp8_products=[Products.attention, Products.expert])) == ""
    first = replace(MODEL, dense_hidden_size=100, moe_every=4)  # layers 0 to 2 are dense
    assert "layer 2" in checked(model=first, precision=replace(EIGHT, bf16_first_layers=2))
    assert checked(model=first, precision=replace(EIGHT, bf16_first_layers=3)) == ""
    assert checked(model=odd, precision=PrecisionConfig()) == ""


@pytest.mark.parametrize("first, last, key", [(4, 0, "first"), (0, 4, "last"), (2, 2, "last"), (9, 1, "first")])
def test_some_layer_must_be_in_fp8(first, last, key):
    said = checked(precision=replace(EIGHT, bf16_first_layers=first, bf16_last_layers=last))
    assert said.startswith(f"precision.bf16_{key}_layers=") and "leaves none of the 4 layers" in said
    assert checked(precision=replace(EIGHT, bf16_first_layers=1, bf16_last_layers=2)) == ""


def test_some_product_must_be_present():
    dense = replace(MODEL, moe_every=0)
    said = checked(model=dense, precision=replace(EIGHT, fp8_products=[Products.expert]))
    assert said == "precision.fp8_products: names expert, which this model does not have"
