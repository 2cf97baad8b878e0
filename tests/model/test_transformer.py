"""The model against a plain statement of the mathematics, in float64, with every feature broken once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from core.errors import ConfigError
from model.attention.plan import ForwardContext
from model.attention.rope import frequencies
from model.config import BalanceConfig, InitConfig, ModelConfig, QKNorm, RopeScaling, RouterConfig, Score, WeightsOn
from model.flops import count_parameters
from model.init import initialise
from model.layers import rms_normalise
from model.roles import registry
from model.transformer import Transformer
from precision.config import Compute, PrecisionConfig
from precision.resolve import resolve
from tests.support import reference_model

SMALL = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    dense_hidden_size=24,
    expert_hidden_size=16,
    num_experts=4,
    moe_every=2,
    nope_every=4,
    attention_chunk_size=5,
    temperature_floor=3.0,
    init=InitConfig(std=1.0, fan_in=True),
)
WHOLE = torch.arange(13)[None]
CLOSED = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 1, 2]])
"""No chunk of 5 positions reaches over a multiple of 5."""
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])


def make(config: ModelConfig) -> Transformer:
    model = Transformer(config, resolve(PrecisionConfig(Compute.float64))).double()
    initialise(model, config, seed=1)
    return model


def logits(model: Transformer, positions: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    tokens = torch.randint(0, SMALL.vocab_size, positions.shape)
    return model(tokens, ForwardContext(positions, routed_tokens=1.0))


def expected(model: Transformer, config: ModelConfig, positions: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    tokens = torch.randint(0, SMALL.vocab_size, positions.shape)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    rows = [reference_model.logits(t, p, config, weights) for t, p in zip(tokens, positions, strict=True)]
    return torch.stack(rows)


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
    "chunk_longer_than_row": replace(SMALL, attention_chunk_size=64),
}


@pytest.mark.parametrize("positions", [WHOLE, PACKED, CLOSED], ids=["whole", "packed", "closed"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_the_plain_statement(config, positions):
    model = make(config)
    for module in model.modules():
        if hasattr(module, "bias_E"):
            module.bias_E.copy_(torch.tensor([0.3, -0.2, 0.1, -0.2]))
    torch.testing.assert_close(logits(model, positions), expected(model, config, positions), rtol=0, atol=1e-6)


def test_a_chunk_looks_back_only_where_one_reaches_over_the_border():
    found = [ForwardContext(positions).plan(5) for positions in (WHOLE, CLOSED, PACKED)]
    assert [plan.halo for plan in found] == [False, False, True]
    assert [None if plan.mask is None else plan.mask.shape[-1] for plan in found] == [None, 5, 10]


def gradients(config: ModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of the same scalar, by the model's own backward and by autograd through the plain statement."""
    model = make(config)
    tokens = torch.randint(0, SMALL.vocab_size, PACKED.shape, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(
        *PACKED.shape, SMALL.vocab_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    (model(tokens, ForwardContext(PACKED)) * weight).sum().backward()
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    state = {**model.state_dict(), **weights}
    for row, positions, factor in zip(tokens, PACKED, weight, strict=True):
        (reference_model.logits(row, positions, config, state) * factor).sum().backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    return own, {name: w.grad if w.grad is not None else torch.zeros_like(w) for name, w in weights.items()}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_gradient_equals_the_plain_statement(config):
    own, plain = gradients(config)
    for name, gradient in plain.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


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
    model = make(broken)
    assert (logits(model, WHOLE) - expected(model, SMALL, WHOLE)).abs().max() > 1e-3


def test_documents_never_see_each_other():
    """Changing one document leaves the logits of its neighbours in the row, up to the rounding of products whose number
    of rows changed.
    """
    model = make(SMALL)
    torch.manual_seed(0)
    tokens = torch.randint(0, SMALL.vocab_size, (1, 13))
    changed = tokens.clone()
    changed[0, 4:11] = (changed[0, 4:11] + 1) % SMALL.vocab_size
    first, second = (model(t, ForwardContext(PACKED[:1])) for t in (tokens, changed))
    same = (first - second).abs().amax(-1)[0] < 1e-12
    assert same.tolist() == [True] * 4 + [False] * 7 + [True] * 2
    leaking = [model(t, ForwardContext(WHOLE)) for t in (tokens, changed)]
    assert not torch.equal(leaking[0][0, 11:], leaking[1][0, 11:]), "control: without boundaries the change is seen"


def test_a_packed_document_equals_the_document_alone():
    model = make(SMALL)
    torch.manual_seed(0)
    tokens = torch.randint(0, SMALL.vocab_size, (1, 13))
    packed = model(tokens, ForwardContext(PACKED[:1]))[0, 4:11]
    torch.testing.assert_close(packed, model(tokens[:, 4:11])[0], rtol=0, atol=1e-10)


def test_parameter_counts_and_roles():
    for config in VARIANTS.values():
        model = make(config)
        assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
        assert set(registry(model)) == {name for name, _ in model.named_parameters()}


def test_llama3_scaling_is_a_hard_cut_when_the_bounds_are_equal():
    """Scout's own figures: of 64 frequencies those from index 35 on are divided by 16 (published configuration)."""
    plain, scaled = frequencies(128, 5e5), frequencies(128, 5e5, RopeScaling())
    ratio = plain / scaled
    assert torch.allclose(ratio[:35], torch.ones(35, dtype=torch.float64))
    assert torch.allclose(ratio[35:], torch.full((29,), 16.0, dtype=torch.float64))
    blended = frequencies(128, 5e5, RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4))
    assert (blended <= plain + 1e-12).all() and (blended >= plain / 8 - 1e-12).all()


@pytest.mark.parametrize(
    "change, key",
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_experts": 1}, "num_experts"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"router": RouterConfig(top_k=9)}, "router.top_k"),
        ({"attention_chunk_size": 0}, "attention_chunk_size"),
        ({"expert_hidden_size": 12}, "expert_hidden_size"),
        ({"layer_list": []}, "layer_list"),
    ],
)
def test_impossible_shapes_are_refused(change, key):
    with pytest.raises(ConfigError) as caught:
        replace(SMALL, **change)
    assert caught.value.key == key


def test_the_layers_of_the_published_models():
    """Scout: every layer a mixture. Maverick: every second. Both: layers 3, 7, ... see everything, unrotated."""
    scout, maverick = (
        ModelConfig(num_layers=8).blocks,
        ModelConfig(num_layers=8, moe_every=2, qk_norm=QKNorm.none).blocks,
    )
    assert [layer.feed_forward.value for layer in scout] == ["moe"] * 8
    assert [layer.feed_forward.value for layer in maverick] == ["dense", "moe"] * 4
    for layers, norm in ((scout, QKNorm.weightless), (maverick, QKNorm.none)):
        bare = [index for index, layer in enumerate(layers) if not layer.rope]
        assert bare == [3, 7]
        for index, layer in enumerate(layers):
            assert layer.temperature is (index in bare)
            assert layer.attention_chunk_size == (None if index in bare else 8192)
            assert layer.qk_norm is (QKNorm.none if index in bare else norm)


def test_norms_of_narrow_activations_are_computed_wide():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 3
    assert torch.equal(rms_normalise(x, 1e-5), rms_normalise(x.float(), 1e-5).bfloat16())
