"""Parameter groups by role, weight decay by role, and AdamW with bf16 moments compared with float32 moments."""

from __future__ import annotations

import copy

import pytest
import torch

from core.errors import ConfigError
from model.roles import Role, registry
from model.transformer import Transformer
from precision.config import Compute, PrecisionConfig
from tests.support.models import give_gradients, network, optimizer_of
from train.optim.config import GroupConfig, Moments, OptimizerConfig, OptimizerKind
from train.optim.optimizer import prime


@pytest.fixture
def model() -> Transformer:
    return network()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_is_plain_with_decay_by_role(model, decay):
    own = {"router": GroupConfig(weight_decay=0.0)}
    config = OptimizerConfig(kind=OptimizerKind.sgd, lr=0.5, weight_decay=decay, groups=own)
    before, info = copy.deepcopy(model), registry(model)
    give_gradients(model)
    optimizer_of(model, config).step()
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        role = info[name].role
        factor = 1.0 if role.initial_constant is not None or role is Role.router else 1 - 0.5 * decay
        torch.testing.assert_close(new, old * factor - 0.5 * new.grad)


def trained(model: Transformer, moments: Moments, steps: int) -> list[torch.Tensor]:
    config = OptimizerConfig(moments=moments, lr=0.01, eps=1e-8)
    optimizer = optimizer_of(model, config)
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    widths = {state["exp_avg"].dtype for state in optimizer.state.values()}
    assert widths == {torch.bfloat16 if moments is Moments.bfloat16 else torch.float32}
    return [p.detach().clone() for p in model.parameters()]


def test_narrow_moments_follow_wide_ones(model):
    """The first update is equal up to float32 rounding. Later updates differ, as bf16 moments have only 3 digits."""
    found = {(kind, steps): trained(copy.deepcopy(model), kind, steps) for kind in Moments for steps in (1, 10)}
    for a, b in zip(found[Moments.float32, 1], found[Moments.bfloat16, 1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    start, wide, narrow = (
        torch.cat([p.detach().flatten() for p in parameters])
        for parameters in (model.parameters(), found[Moments.float32, 10], found[Moments.bfloat16, 10])
    )
    assert 0 < (wide - narrow).norm() < 0.02 * (wide - start).norm()


def test_bf16_moments_reject_a_slow_second_moment():
    with pytest.raises(ConfigError, match="lose updates"):
        OptimizerConfig(moments=Moments.bfloat16, beta2=0.999)


def test_an_unknown_role_is_rejected():
    with pytest.raises(ConfigError, match=r"groups\.routr: no such role"):
        OptimizerConfig(groups={"routr": GroupConfig()})


@pytest.mark.parametrize("kind", [OptimizerKind.adamw, OptimizerKind.muon])
@pytest.mark.parametrize("compute", Compute)
@pytest.mark.parametrize("moments", Moments)
def test_primed_state_is_what_a_first_step_makes(kind, compute, moments):
    precision, config = PrecisionConfig(compute), OptimizerConfig(kind=kind, moments=moments)
    model, other = network(precision), network(precision)
    primed, stepped = (optimizer_of(m, config) for m in (model, other))
    prime(primed)
    give_gradients(other)
    stepped.step()
    assert len(primed.state) == len(stepped.state) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        mine, theirs = primed.state[parameter], stepped.state[other.get_parameter(name)]
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    widths = {value.dtype for state in stepped.state.values() for key, value in state.items() if key != "step"}
    assert widths == {torch.bfloat16 if moments is Moments.bfloat16 else precision.master_dtype}
