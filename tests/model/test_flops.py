"""Compare closed-form FLOPs with the counts of a real forward and backward pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.attention.plan import squared_lengths
from model.config import RouterConfig
from model.flops import mean_lengths, training_flops, vision_flops, vision_parameters
from model.vision.config import VisionConfig
from model.vision.encoder import VisionEncoder
from precision.config import PrecisionConfig
from precision.resolve import Precision
from tests.support.models import build, small

SMALL = small(expert_hidden_size=40)


@pytest.mark.parametrize("config", [SMALL, small(router=RouterConfig(top_k=2), shared_expert_hidden_size=0)])
def test_matrix_flops_equal_pytorchs_counter(config):
    """Leave out attention, since PyTorch's counter ignores masks. Use float64, in which experts run as plain matmuls,
    since the counter does not know the grouped kernel.
    """
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    model = build(config)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(value for operation, value in counts.items() if "attention" not in str(operation))
    assert matrices / tokens.numel() == training_flops(config, 32).matrices


def test_attention_counts_causal_pairs_within_the_chunk():
    inner = SMALL.num_heads * SMALL.head_dim
    pairs = 3 * 16 / 2 + 1 * 64 / 2  # mean keys per query: half of 16 in three layers, half of 64 in one
    assert training_flops(SMALL, 64).attention == 3 * (2 * 2 * pairs * inner)
    assert training_flops(SMALL, 8).attention == 3 * (2 * 2 * 4 * 8 / 2 * inner)


def test_attention_of_packed_documents_counts_their_squares():
    """Rows of 30 + 34 and of 64 tokens: (30^2 + 34^2 + 64^2) / 128 = 48.0625. Chunks of 16: 1 + 2 + 4 whole ones,
    with rests of 14 and 2: (1 + 2 + 4) * 16^2 + 14^2 + 2^2 = 1992.
    """
    positions = torch.stack([torch.cat([torch.arange(30), torch.arange(34)]), torch.arange(64)])
    squares = {chunk: squared_lengths(positions, chunk) for chunk in (None, 16)}
    assert squares == {None: 900 + 1156 + 4096, 16: 7 * 256 + 196 + 4}
    lengths, inner = mean_lengths(squares, positions.numel()), SMALL.num_heads * SMALL.head_dim
    assert lengths == {None: 48.0625, 16: 15.5625}
    found = training_flops(SMALL, lengths)
    assert found.attention == 6 * inner * (3 * 15.5625 + 48.0625) < training_flops(SMALL, 64).attention, "the control"
    assert found.matrices == training_flops(SMALL, 64).matrices
    whole = {chunk: squared_lengths(positions[1:], chunk) / 64 for chunk in (None, 16)}
    assert training_flops(SMALL, whole) == training_flops(SMALL, 64)


def test_flops_of_the_vision_encoder_per_tile():
    """Count the multiplications of a small encoder as torch issues them, and Scout's in closed form."""
    vision = VisionConfig(48, 3, 4, 160, 40, 28, 7, image_token_id=0)
    with torch.device("meta"):
        encoder = VisionEncoder(vision, 64, Precision(PrecisionConfig()).plain, torch.float32)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(5, 3, 28, 28))
    assert vision_flops(vision, 64).total / 3 == counter.get_total_flops() / 5
    assert vision_parameters(vision, 64) == sum(p.numel() for p in encoder.parameters())
    assert round(vision_flops(VisionConfig(), 5120).total / 3 / 1e9, 1) == 1015.6
