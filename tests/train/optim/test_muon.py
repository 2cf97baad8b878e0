"""Compare Muon's iteration with an SVD and its step with a plain implementation; check its groups and settings."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config import load
from core.errors import ConfigError
from model.roles import Role, registry
from model.transformer import Transformer
from precision.config import Compute, ParamDtype, PrecisionConfig
from tests.support.models import give_gradients, network, optimizer_of
from train.config import TrainConfig
from train.optim.config import GroupConfig, Moments, MuonConfig, MuonScale, OptimizerConfig, OptimizerKind
from train.optim.muon import orthogonalise
from train.optim.optimizer import set_learning_rate

WIDE = PrecisionConfig(Compute.float64)
MATRICES = {
    *("query", "key", "value", "attention_output", "dense_gate", "dense_up", "dense_down"),
    *("query_down", "query_up", "latent_down", "latent_up"),
    *("shared_gate", "shared_up", "shared_down", "expert_gate_up", "expert_down"),
}


def muon(model: Transformer, **options: Any) -> Any:
    return optimizer_of(model, OptimizerConfig(kind=OptimizerKind.muon, **options))


def scalar_iteration(values: Tensor, steps: int) -> Tensor:
    """Apply the Newton-Schulz polynomial to singular values, `steps` times."""
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize("rows, columns", [(12, 12), (7, 20), (20, 7), (1, 5)])
def test_newton_schulz_changes_singular_values_only(rows, columns):
    """Singular vectors do not change; each singular value follows the scalar polynomial."""
    x = torch.randn(3, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = scalar_iteration(values / values.norm(dim=-1, keepdim=True), 5)
    torch.testing.assert_close(orthogonalise(x, 5, 0.0), left * values[..., None, :] @ right, rtol=0, atol=1e-12)
    assert ((values > 0.6) & (values < 1.3)).all()


def test_newton_schulz_comes_near_the_orthogonal_factor():
    """This holds for every scale and dtype. Zeros (an expert without tokens) stay zeros."""
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(2))
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for scale in (1e-4, 1.0, 1e4):
            found = orthogonalise((x * scale).to(dtype), 5, 1e-7)
            assert found.dtype is dtype
            assert (found.double() - (left @ right).double()).norm() < 0.25 * (left @ right).norm()
    assert not orthogonalise(torch.zeros(2, 4, 8), 5, 1e-7).any()
    apart = (orthogonalise(x, 5, 1e-7) - orthogonalise(x.flatten(0, 1)[None], 5, 1e-7).view_as(x)).norm()
    assert apart > 0.1 * x.shape[0], "control: two matrices treated as one"


def reference_step(weight: Tensor, gradients: list[Tensor], config: MuonConfig, lr: float, decay: float) -> Tensor:
    """Apply Muon as published, one matrix at a time: momentum m <- b m + g, Nesterov g + b m."""
    for index in itertools.product(*(range(size) for size in weight.shape[:-2])):
        rows, columns = weight[index].shape
        momentum = torch.zeros_like(weight[index])
        for gradient in gradients:
            momentum = config.momentum * momentum + gradient[index]
            ahead = gradient[index] + config.momentum * momentum if config.nesterov else momentum
            left, values, right = torch.linalg.svd(ahead, full_matrices=False)
            update = left @ torch.diag(scalar_iteration(values / values.norm(), config.steps)) @ right
            factor = {
                MuonScale.match_adamw: 0.2 * math.sqrt(max(rows, columns)),
                MuonScale.unit_rms_norm: math.sqrt(rows / columns),
                MuonScale.shape_scaling: math.sqrt(max(1, rows / columns)),
            }[config.scale]
            weight[index] = weight[index] - lr * decay * weight[index] - lr * factor * update
    return weight


def test_decay_follows_the_schedule():
    """Half the learning rate halves both the updates and the weight decay."""
    model, other = network(WIDE), network(WIDE)
    half, whole = muon(model, lr=0.02, weight_decay=0.3), muon(other, lr=0.01, weight_decay=0.3)
    set_learning_rate(half.param_groups, 0.5)
    for changed, optimizer in ((model, half), (other, whole)):
        give_gradients(changed)
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", MuonScale)
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_equal_the_plain_statement(scale, nesterov):
    """Compare two steps. Each expert's gate and up are separate matrices. AdamW trains all other parameters."""
    config = MuonConfig(nesterov=nesterov, scale=scale, eps=1e-300)
    model, other = network(WIDE), network(WIDE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = [
        muon(model, lr=0.02, muon=config, weight_decay=0.3),
        torch.optim.AdamW(other.parameters(), 0.02, betas=(0.9, 0.95), weight_decay=0.3),
    ]
    gradients: dict[str, list[Tensor]] = {name: [] for name in before}
    for step in range(2):
        for changed, optimizer in zip((model, other), optimizers, strict=True):
            give_gradients(changed, step)
            optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name].append(parameter.grad.clone())
    assert {role.name for role in Role if role.is_matrix and not role.is_vision} == MATRICES
    adamw = dict(other.named_parameters())
    for name, info in registry(model).items():
        found = model.get_parameter(name)
        if info.role.initial_constant is not None:
            continue  # no weight decay: checked below
        wanted = adamw[name]
        if info.role.name in MATRICES:
            wanted = reference_step(before[name], gradients[name], config, 0.02, 0.3)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11, msg=name)
    decays = {group["name"]: group["weight_decay"] for group in optimizers[0].param_groups}
    assert decays["block_norm"] == decays["final_norm"] == 0 and decays["query"] == decays["head"] == 0.3


def test_every_parameter_is_in_one_group_with_its_own_rate():
    model = network(WIDE)
    own = {"query": GroupConfig(lr_scale=0.5), "head": GroupConfig(lr_scale=0.25, weight_decay=0.0)}
    optimizer = muon(model, lr=0.004, muon=MuonConfig(lr=0.02), groups=own)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    peaks = {group["name"]: group["peak_lr"] for group in optimizer.param_groups}
    assert peaks["query"] == 0.01 and peaks["expert_down"] == 0.02, "muon.lr times the role's factor"
    assert peaks["head"] == 0.001 and peaks["router"] == peaks["block_norm"] == 0.004
    shared = muon(model, lr=0.004)
    assert {group["peak_lr"] for group in shared.param_groups} == {0.004}, "one rate by default"


def moved(options: dict[str, Any], precision: PrecisionConfig, steps: int = 8) -> Tensor:
    """Train; return the change of all matrices as one vector."""
    model = network(precision)
    start = copy.deepcopy(model)
    optimizer = muon(model, lr=0.01, **options)
    for step in range(steps):
        give_gradients(model, step)
        optimizer.step()
    infos = registry(model)
    pairs = ((model.get_parameter(n), start.get_parameter(n)) for n in infos if infos[n].role.is_matrix)
    return torch.cat([(a - b).detach().double().flatten() for a, b in pairs])


def test_narrow_formats_follow_wide_ones():
    """Muon with bf16 momentum, a bf16 iteration or a model with bf16 matmuls stays near float32."""
    wide = moved({}, PrecisionConfig())
    halves: dict[str, tuple[dict[str, Any], PrecisionConfig]] = {
        "moments": ({"moments": Moments.bfloat16}, PrecisionConfig()),
        "products": ({"muon": MuonConfig(products=Compute.bfloat16)}, PrecisionConfig()),
        "model": ({}, PrecisionConfig(Compute.bfloat16)),
        "storage": ({}, PrecisionConfig(Compute.bfloat16, ParamDtype.bfloat16)),
    }
    apart = {name: float((moved(*half) - wide).norm() / wide.norm()) for name, half in halves.items()}
    assert all(0 < difference < 0.06 for difference in apart.values()), apart
    assert apart["model"] == apart["products"], "the iteration has the dtype of the model's products"
    unrounded = moved({"muon": MuonConfig(products=Compute.float32)}, PrecisionConfig(Compute.bfloat16))
    assert torch.equal(unrounded, wide)


def test_a_matrix_without_a_gradient_is_an_error():
    model = network(WIDE)
    optimizer = muon(model)
    give_gradients(model)
    model.layers["0"].attention.query.weight.grad = None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.query\.weight has no gradient"):
        optimizer.step()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimizer.muon.momentum=1"], r"optimizer\.muon\.momentum=1\.0: must lie in \[0, 1\)"),
        (["optimizer.muon.steps=0"], r"optimizer\.muon\.steps=0: must be from 1 to 20; try 5"),
        (["optimizer.muon.lr=0"], r"optimizer\.muon\.lr=0\.0: must be positive"),
        (["optimizer.moments=bfloat16", "optimizer.muon.momentum=0.995"], r"muon\.momentum=0\.995: bfloat16 moments"),
    ],
)
def test_bad_values_are_rejected(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load("train", TrainConfig, ["optimizer=muon", *overrides])
