"""Compare the model in float64 with a plain implementation of its mathematics. Controls break each feature once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention.plan import ForwardContext
from model.attention.rope import frequencies
from model.config import (
    BalanceConfig,
    InitConfig,
    LatentConfig,
    ModelConfig,
    QKNorm,
    RopeScaling,
    RouterConfig,
    Score,
    WeightsOn,
)
from model.flops import count_parameters
from model.kernels.heads import rms_normalise
from model.roles import registry
from model.transformer import Transformer
from tests.model import reference_model
from tests.support.models import build, small

SMALL = small(attention_chunk_size=5, temperature_floor=3.0, init=InitConfig(std=1.0, fan_in=True))
WHOLE = torch.arange(13)[None]
CLOSED = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 1, 2]])
"""Positions for which no attention chunk of 5 crosses a multiple of 5 in the sequence."""
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
LATENT: dict[str, Any] = {
    "num_kv_heads": 4,
    "qk_norm": QKNorm.none,
    "nope_every": 0,
    "latent": LatentConfig(kv_rank=12, query_rank=10, rope_dim=4, value_dim=6),
}
VARIANTS = {
    "llama4": SMALL,
    "top2": replace(SMALL, router=RouterConfig(top_k=2)),
    "biased": replace(SMALL, balance=BalanceConfig(bias_rate=0.1), router=RouterConfig(top_k=2)),
    "no_qk_norm": replace(SMALL, qk_norm=QKNorm.none),
    "mixtral_routing": replace(
        SMALL,
        shared_expert_hidden_size=0,
        moe_every=1,
        router=RouterConfig(top_k=2, score=Score.softmax, norm_topk_prob=True, weights_on=WeightsOn.output),
    ),
    "scaled_weights": replace(SMALL, router=RouterConfig(top_k=2, scale=2.5)),
    "latent": replace(SMALL, **LATENT),
    "latent_in_groups": replace(
        SMALL,
        **LATENT,
        router=RouterConfig(2, norm_topk_prob=True, groups=2, selection_bias=True, weights_on=WeightsOn.output),
    ),
    "chunk_longer_than_row": replace(SMALL, attention_chunk_size=64),
}


def draw_tokens(positions: Tensor) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, positions.shape, generator=torch.Generator().manual_seed(0))


def logits(model: Transformer, positions: Tensor) -> Tensor:
    return model(draw_tokens(positions), ForwardContext(positions, routed_tokens=1.0))


def expected(state: dict[str, Tensor], config: ModelConfig, positions: Tensor) -> Tensor:
    pairs = zip(draw_tokens(positions), positions, strict=True)
    return torch.stack([reference_model.logits(t, p, config, state) for t, p in pairs])


@pytest.mark.parametrize("positions", [WHOLE, PACKED, CLOSED], ids=["whole", "packed", "closed"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_gradients_match_the_reference(config, positions):
    model = build(config, seed=1)
    for module in model.modules():
        if hasattr(module, "bias_E"):
            module.bias_E.copy_(torch.tensor([0.3, -0.2, 0.1, -0.2]))
    plain = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    y, wanted = logits(model, positions), expected({**model.state_dict(), **plain}, config, positions)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-6)
    weight = torch.randn(*y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * weight).sum().backward()
    (wanted * weight).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if plain[name].grad is None else plain[name].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


BROKEN = {
    "rope": replace(SMALL, rope_theta=10_000.0),
    "chunk": replace(SMALL, attention_chunk_size=6),
    "temperature": replace(SMALL, temperature=False),
    "qk_norm": replace(SMALL, qk_norm=QKNorm.none),
    "score_placement": replace(SMALL, router=RouterConfig(weights_on=WeightsOn.output)),
    "nope_layers": replace(SMALL, nope_every=3),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_the_comparison_notices_each_feature(broken):
    model = build(broken, seed=1)
    assert (logits(model, WHOLE) - expected(model.state_dict(), SMALL, WHOLE)).abs().max() > 1e-3


def test_a_halo_only_where_a_chunk_crosses_a_block():
    found = [ForwardContext(positions).plan(5) for positions in (WHOLE, CLOSED, PACKED)]
    assert [plan.halo for plan in found] == [False, False, True]
    assert [None if plan.mask is None else plan.mask.shape[-1] for plan in found] == [None, 5, 10]


@pytest.mark.parametrize("config", [*VARIANTS.values(), replace(SMALL, tie_embeddings=True)], ids=[*VARIANTS, "tied"])
def test_parameter_counts_and_roles(config):
    model = build(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    assert set(registry(model)) == {name for name, _ in model.named_parameters()}


def test_norms_of_narrow_activations_are_computed_wide():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 3
    assert torch.equal(rms_normalise(x, 1e-5), rms_normalise(x.float(), 1e-5).bfloat16())


def test_llama3_scaling_with_equal_bounds_is_a_hard_cut():
    """Scout's published configuration divides the frequencies from index 35 of 64 on by 16."""
    ratio = frequencies(128, 5e5) / frequencies(128, 5e5, RopeScaling())
    assert torch.allclose(ratio, torch.tensor([1.0] * 35 + [16.0] * 29, dtype=torch.float64))
