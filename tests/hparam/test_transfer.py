"""Transferred values: identities that hold for every shape, a pinned table, and one error for each mistake."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from hparam.config import HparamConfig
from hparam.rules import HeadForm, Parametrization
from hparam.scale import SPANS, Scale, check_registry, scale_of
from hparam.transfer import BaseHyperparameters, Resolved, transfer
from model.config import LayerConfig, ModelConfig, MultipliersConfig
from model.roles import Role
from model.tensor_source import parameter_infos

BASE = Scale(
    hidden_size=256,
    num_layers=8,
    head_dim=64,
    query_width=256,
    value_width=128,
    dense_hidden_size=1024,
    shared_expert_hidden_size=512,
    expert_hidden_size=512,
    num_experts=16,
    top_k=2,
    batch=2**19,
    tokens=2_500_000_000,
)
LARGER = Scale(1024, 24, 64, 1024, 512, 8192, 2048, 1024, 64, 8, 2**21, 40_000_000_000)
MATRICES = [role for role in Role if role.initial_constant is None]
MUON = frozenset(role for role in Role if role.is_matrix)
FOUND = BaseHyperparameters(
    std=dict.fromkeys(MATRICES, 0.02),
    lr=dict.fromkeys(Role, 0.008),
    weight_decay={role: 0.0 if role.initial_constant is not None else 0.1 for role in Role},
    eps=1e-8,
    beta2=0.95,
)
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, dense_hidden_size=48
)
GOLDEN = Path(__file__).with_name("table.json")


def carried(target: Scale = LARGER, found: BaseHyperparameters = FOUND, base: Scale = BASE, **config: Any) -> Resolved:
    return transfer(HparamConfig(base=base, **config), target, found)


def figures(found: Resolved) -> dict[str, object]:
    return {
        "roles": {role.name: asdict(own) for role, own in found.roles.items()},
        "beta2": found.beta2,
        "multipliers": asdict(found.multipliers),
        "digest": found.digest,
    }


@pytest.mark.parametrize("rules", Parametrization)
@pytest.mark.parametrize("head", HeadForm)
def test_nothing_changes_at_the_bases_size(rules, head):
    for muon in (frozenset(), MUON):
        found = carried(BASE, replace(FOUND, muon=muon, muon_scale="match_adamw"), rules=rules, head=head)
        assert found.multipliers == MultipliersConfig() and found.beta2 == 0.95 and found.warnings == ()
        for role, own in found.roles.items():
            assert own.std in (None, 0.02) and own.lr == 0.008 and own.eps == pytest.approx(1e-8)
            assert own.weight_decay == pytest.approx(0.0 if role.initial_constant is not None else 0.1)


def test_learning_rate_times_decay_times_steps_is_constant():
    wanted = 0.008 * 0.1 * BASE.steps
    wide, deep = replace(BASE, hidden_size=2048, query_width=2048), replace(BASE, num_layers=32)
    for target in (LARGER, wide, replace(BASE, batch=2**20), deep):
        for role, own in carried(target).roles.items():
            if role.initial_constant is None:
                assert own.lr * own.weight_decay * target.steps == pytest.approx(wanted, rel=1e-8)
    assert carried().tau == pytest.approx(1 / wanted, rel=1e-8)
    own = carried(tau=0.5).roles[Role.query]
    assert own.lr * own.weight_decay * LARGER.steps == pytest.approx(2.0)


def test_values_worked_out_by_hand():
    found = carried()
    noise = 4**0.5 * 16**-0.3
    assert found.roles[Role.embedding].lr == pytest.approx(0.008 * noise)
    assert found.roles[Role.query].lr == pytest.approx(0.008 * noise / 4)
    assert found.roles[Role.dense_down].lr == pytest.approx(0.008 * noise / 8), "by its own fan in"
    assert found.roles[Role.expert_down].lr == pytest.approx(0.008 * noise / 2)
    assert found.roles[Role.expert_down].std == pytest.approx(0.02 / math.sqrt(2))
    assert found.roles[Role.router].std == pytest.approx(0.02 / 4), "as an output, not as a hidden matrix"
    assert found.roles[Role.expert_down].eps == pytest.approx(1e-8 / noise / 4 / 3 / 4)
    assert found.roles[Role.qk_norm].eps == pytest.approx(1e-8 / noise / 3), "gains that all heads share"
    assert asdict(found.multipliers) == pytest.approx({"residual": 1 / 3, "logits": 1, "attention": 1, "gates": 1})
    assert found.beta2 == 0.9, "0.95^4 is below the smallest allowed"
    assert carried(alpha=0.5).multipliers.residual == pytest.approx(3**-0.5)
    assert carried(alpha=0.5).roles[Role.query].lr == pytest.approx(0.008 * noise / 4 / 3**0.5)
    heads = carried(replace(LARGER, head_dim=128))
    assert heads.multipliers.attention == pytest.approx(2**-0.5)
    assert carried(found=replace(FOUND, sums_gates=True)).multipliers.gates == 0.25


@pytest.mark.parametrize("scale, exponent", [("unit_rms_norm", 0.0), ("shape_scaling", 0.0), ("match_adamw", -0.5)])
def test_muon_gets_what_its_scale_lacks(scale, exponent):
    """An update's spectral norm, the rate times `MuonScale.factor`, should be proportional to sqrt(out / in)."""
    from train.optim.config import MuonScale

    sizes = {name: 4 * size for name, size in asdict(BASE).items() if name.endswith(("width", "hidden_size"))}
    wide, muon = replace(BASE, **sizes), replace(FOUND, muon=MUON, muon_scale=scale)
    found = carried(wide, muon)
    assert found.roles[Role.query].lr == pytest.approx(0.008 * 4**exponent)
    assert found.roles[Role.head].lr == pytest.approx(0.008 / 4), "AdamW trains the rest"
    other = replace(wide, expert_hidden_size=8 * BASE.expert_hidden_size)  # another shape, too
    for role in (Role.expert_gate_up, Role.expert_down):
        step = []
        for size, rate in ((BASE, 0.008), (other, carried(other, muon).roles[role].lr)):
            rows, columns = (getattr(size, str(side)) for side in SPANS[role])
            step.append(rate * MuonScale(scale).factor(rows, columns) / math.sqrt(rows / columns))
        assert step[0] == pytest.approx(step[1]), role


def test_the_table_is_pinned():
    """If a rule changes, change `rules.VERSION` and write the table again:
    `python -c "from tests.hparam.test_transfer import *; GOLDEN.write_text(golden())"`."""
    assert json.loads(GOLDEN.read_text()) == json.loads(golden())


def golden() -> str:
    cases = {
        "adamw": carried(),
        "muon": carried(found=replace(FOUND, muon=MUON, muon_scale="match_adamw")),
        "multiplier head": carried(head=HeadForm.multiplier),
        "standard": carried(rules=Parametrization.standard),
    }
    return json.dumps({name: figures(found) for name, found in cases.items()}, indent=1) + "\n"


@pytest.mark.parametrize(
    "base, target, warning",
    [
        ({}, {"num_experts": 128}, "sparsity changes (2 of 16 experts at the base, 8 of 128 here)"),
        ({}, {"expert_hidden_size": 256}, "expert_hidden_size / hidden_size is 0.125 times"),
        ({}, {"tokens": BASE.tokens}, "4 times the base's for 1 times its tokens, and the critical batch is unknown"),
        ({"hidden_size": 64}, {}, "the base is small (8 layers of hidden size 64)"),
    ],
)
def test_each_warning_has_its_cause(base, target, warning):
    assert any(warning in line for line in carried(replace(LARGER, **target), base=replace(BASE, **base)).warnings)
    assert not any(warning in line for line in carried().warnings)


def test_batches_above_the_critical_one_are_rejected():
    """The critical batch is 2^20 tokens at the base, and 16^0.46 = 3.6 times as large for 16 times the tokens."""
    assert carried(critical_batch=2.0**20)
    large = replace(LARGER, batch=2**22)
    with pytest.raises(ConfigError, match=r"global_batch_size: 4,194,304 tokens are above .* critical batch of 3,7"):
        carried(large, critical_batch=2.0**20)
    assert carried(large, critical_batch=2.0**20, allow_supercritical=True)


@pytest.mark.parametrize("size", ["dense_hidden_size", "shared_expert_hidden_size", "num_experts"])
def test_a_base_lacks_what_the_target_has(size):
    message = rf"hparam.base.{size}=0: the base has none, but this model has .*: sweep a base"
    with pytest.raises(ConfigError, match=message):
        carried(base=replace(BASE, **{size: 0}))


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(**SIZES, expert_hidden_size=40, shared_expert_hidden_size=24, num_experts=4, moe_every=2),
        ModelConfig(**{**SIZES, "num_layers": 2}, moe_every=0, layer_list=[LayerConfig(), LayerConfig(rope=False)]),
    ],
    ids=["moe", "dense"],
)
def test_matrices_have_the_sizes_of_their_roles(model):
    scale = scale_of(model, 1024, 10240)
    check_registry(parameter_infos(model), scale)
    assert scale.query_width == 64 and scale.value_width == 32 and scale.steps == 10
    with pytest.raises(TypeError, match=r"attention.query.weight is .* its role query requires"):
        check_registry(parameter_infos(model), replace(scale, query_width=32))
