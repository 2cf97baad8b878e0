"""Groups by role, decay by role, and AdamW with narrow moments against a plain statement."""

from __future__ import annotations

import copy

import pytest
import torch

from core.errors import ConfigError
from model.config import ModelConfig
from model.init import initialise
from model.roles import Role, registry
from model.transformer import Transformer
from parallel.layout import ParallelConfig
from parallel.mesh import meshes_of_rank
from parallel.sharding import shard_specs
from precision.config import PrecisionConfig
from precision.resolve import resolve
from train.optim.optimizer import (
    GroupConfig,
    Moments,
    OptimizerConfig,
    OptimizerKind,
    make_optimizer,
    prime,
    set_learning_rate,
)

MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dense_hidden_size=16,
    expert_hidden_size=16,
    num_experts=2,
)


@pytest.fixture
def model() -> Transformer:
    made = Transformer(MODEL, resolve(PrecisionConfig()))
    initialise(made, MODEL, seed=0)
    return made


def made(model: Transformer, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of one process."""
    meshes = meshes_of_rank(ParallelConfig().resolve(1), 0)
    return make_optimizer(model, shard_specs(registry(model), MODEL, meshes), config, meshes)


def give_gradients(model: Transformer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_groups_are_named_by_role_and_cover_everything_once(model):
    optimizer = made(model, OptimizerConfig())
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len(
        list(model.parameters())
    )
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decay["block_norm"] == decay["final_norm"] == 0.0
    assert decay["router"] == decay["expert_gate_up"] == decay["embedding"] == 0.1


def test_a_role_may_have_its_own_rate_and_decay(model):
    config = OptimizerConfig(groups={"router": GroupConfig(lr_scale=0.5, weight_decay=0.0)})
    optimizer = made(model, config)
    set_learning_rate(optimizer.param_groups, 0.1)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["router"]["lr"] == pytest.approx(config.lr * 0.5 * 0.1) and groups["router"]["weight_decay"] == 0.0
    assert groups["head"]["lr"] == pytest.approx(config.lr * 0.1)


def test_sgd_is_plain(model):
    config = OptimizerConfig(kind=OptimizerKind.sgd, lr=0.5, weight_decay=0.0)
    before = copy.deepcopy(model)
    give_gradients(model)
    made(model, config).step()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.5 * new.grad)


def test_sgd_decays_by_role(model):
    own = {"router": GroupConfig(weight_decay=0.0)}
    config = OptimizerConfig(kind=OptimizerKind.sgd, lr=0.5, weight_decay=0.1, groups=own)
    before, info = copy.deepcopy(model), registry(model)
    give_gradients(model)
    made(model, config).step()
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        role = info[name].role
        decay = 0.0 if role.is_norm or role is Role.router else 0.1
        torch.testing.assert_close(new, old * (1 - 0.5 * decay) - 0.5 * new.grad)


def trained(model: Transformer, moments: Moments, steps: int) -> list[torch.Tensor]:
    config = OptimizerConfig(moments=moments, lr=0.01, eps=1e-8)
    optimizer = made(model, config)
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    widths = {state["exp_avg"].dtype for state in optimizer.state.values()}
    assert widths == {torch.bfloat16 if moments is Moments.bfloat16 else torch.float32}
    return [p.detach().clone() for p in model.parameters()]


def test_narrow_moments_follow_wide_ones(model):
    """One step is the same update up to the rounding of fp32; later ones drift by bf16's 3 digits of each moment."""
    start = [p.detach().clone() for p in model.parameters()]
    other = copy.deepcopy(model)
    for a, b in zip(
        trained(copy.deepcopy(model), Moments.float32, 1), trained(other, Moments.bfloat16, 1), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    wide, narrow = (
        trained(copy.deepcopy(model), Moments.float32, 10),
        trained(copy.deepcopy(model), Moments.bfloat16, 10),
    )
    moved = torch.cat([(a - b).flatten() for a, b in zip(wide, start, strict=True)]).norm()
    apart = torch.cat([(a - b).flatten() for a, b in zip(wide, narrow, strict=True)]).norm()
    assert 0 < apart < 0.02 * moved


def test_narrow_moments_refuse_a_slow_second_moment():
    with pytest.raises(ConfigError, match="lose updates"):
        OptimizerConfig(moments=Moments.bfloat16, beta2=0.999)


def test_an_unknown_role_is_refused():
    with pytest.raises(ConfigError, match=r"groups\.routr: no such role"):
        OptimizerConfig(groups={"routr": GroupConfig()})


@pytest.mark.parametrize("moments", Moments)
def test_primed_state_is_what_a_first_step_makes(model, moments):
    config = OptimizerConfig(moments=moments)
    other = copy.deepcopy(model)
    primed, stepped = (made(m, config) for m in (model, other))
    prime(primed)
    give_gradients(other)
    stepped.step()
    for mine, theirs in zip(primed.state.values(), stepped.state.values(), strict=True):
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert Role.router.name in {group["name"] for group in primed.param_groups}
