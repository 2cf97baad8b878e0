"""The closed forms against counting what a real forward and backward do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, RouterConfig
from model.flops import count_parameters, training_flops
from model.init import initialise
from model.transformer import Transformer
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    dense_hidden_size=48,
    expert_hidden_size=40,
    num_experts=4,
    moe_every=2,
    attention_chunk_size=16,
)
SCOUT = ModelConfig()


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, router=RouterConfig(top_k=2), shared_expert_hidden_size=0)])
def test_matrix_flops_equal_pytorchs_counter(config):
    """Attention aside, which PyTorch counts without regard to masks. In float64 experts are multiplied by plain
    products, which its counter sees; the grouped kernel it does not know.
    """
    model = Transformer(config, resolve(PrecisionConfig(Compute.float64))).double()
    initialise(model, config, seed=0)
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(value for operation, value in counts.items() if "attention" not in str(operation))
    assert matrices / tokens.numel() == training_flops(config, 32).matrices


def test_attention_counts_causal_pairs_within_the_chunk():
    inner = SMALL.num_heads * SMALL.head_dim
    pairs = 3 * 16 / 2 + 1 * 64 / 2  # three layers reach their chunk of 16, one the row of 64; half of it on average
    assert training_flops(SMALL, 64).attention == 3 * (2 * 2 * pairs * inner)
    assert training_flops(SMALL, 8).attention == 3 * (2 * 2 * 4 * 8 / 2 * inner)


def test_scout_and_maverick_have_their_published_sizes():
    """Exact figures of the text models, both embeddings counted (closed form equals transformers' own models)."""
    scout, maverick = count_parameters(SCOUT), count_parameters(replace(SCOUT, num_experts=128, moe_every=2))
    assert (scout.total, scout.active) == (107_769_861_120, 17_172_894_720)
    assert (maverick.total, maverick.active) == (400_711_848_960, 17_184_691_200)
