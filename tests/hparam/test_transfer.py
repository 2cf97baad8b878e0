"""What a transfer finds: identities that hold for every shape, a pinned table, and one error for each mistake."""

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
LARGER = replace(
    BASE,
    hidden_size=1024,
    num_layers=24,
    query_width=1024,
    value_width=512,
    dense_hidden_size=8192,
    shared_expert_hidden_size=2048,
    expert_hidden_size=1024,
    num_experts=64,
    top_k=8,
    batch=2**21,
    tokens=40_000_000_000,
)
MATRICES = [role for role in Role if not role.is_norm]
FOUND = BaseHyperparameters(
    std=dict.fromkeys(MATRICES, 0.02),
    lr=dict.fromkeys(Role, 0.008),
    weight_decay={role: 0.0 if role.is_norm else 0.1 for role in Role},
    eps=1e-8,
    beta2=0.95,
)
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, dense_hidden_size=48
)
GOLDEN = Path(__file__).with_name("table.json")


def carried(target: Scale = LARGER, found: BaseHyperparameters = FOUND, **config: object) -> Resolved:
    return transfer(HparamConfig(base=BASE, **config), target, found)  # type: ignore[arg-type]


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
    for muon in (frozenset(), frozenset(role for role in Role if role.is_matrix)):
        found = carried(BASE, replace(FOUND, muon=muon, muon_scale="match_adamw"), rules=rules, head=head)
        assert found.multipliers == MultipliersConfig() and found.beta2 == 0.95 and found.warnings == ()
        for role, own in found.roles.items():
            assert own.std in (None, 0.02) and own.lr == 0.008 and own.eps == pytest.approx(1e-8)
            assert own.weight_decay == pytest.approx(0.0 if role.is_norm else 0.1)


def test_learning_rate_times_decay_times_steps_is_the_same_everywhere():
    wanted = 0.008 * 0.1 * BASE.steps
    for target in (
        LARGER,
        replace(BASE, hidden_size=2048, query_width=2048),
        replace(BASE, batch=2**20),
        replace(BASE, num_layers=32),
    ):
        for role, own in carried(target).roles.items():
            if not role.is_norm:
                assert own.lr * own.weight_decay * target.steps == pytest.approx(wanted, rel=1e-8)
    assert carried().tau == pytest.approx(1 / wanted, rel=1e-8)
    own = carried(tau=0.5).roles[Role.query]
    assert own.lr * own.weight_decay * LARGER.steps == pytest.approx(2.0)


def test_both_forms_of_the_head_train_the_same_function():
    """A head w with a factor m on its logits trains as m * w does at m times the rate, epsilon and decay over m; the
    training itself is compared in `tests.train.metap.test_hyperparameters`.
    """
    absorbed, multiplier = carried(), carried(head=HeadForm.multiplier)
    m = multiplier.multipliers.logits
    assert m == 0.25 and absorbed.multipliers.logits == 1
    ours, theirs = absorbed.roles[Role.head], multiplier.roles[Role.head]
    assert ours.std is not None and theirs.std is not None
    assert ours.std == pytest.approx(m * theirs.std) and ours.lr == pytest.approx(m * theirs.lr)
    assert ours.eps == pytest.approx(theirs.eps / m) and ours.weight_decay == pytest.approx(theirs.weight_decay / m)


def test_figures_worked_out_by_hand():
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
    assert found.beta2 == 0.9, "0.95^4 is below what is allowed"
    assert carried(alpha=0.5).multipliers.residual == pytest.approx(3**-0.5)
    assert carried(alpha=0.5).roles[Role.query].lr == pytest.approx(0.008 * noise / 4 / 3**0.5)
    heads = carried(replace(LARGER, head_dim=128))
    assert heads.multipliers.attention == pytest.approx(2**-0.5)
    assert carried(found=replace(FOUND, sums_gates=True)).multipliers.gates == 0.25


@pytest.mark.parametrize("scale, exponent", [("unit_rms_norm", 0.0), ("shape_scaling", 0.0), ("match_adamw", -0.5)])
def test_muon_needs_what_its_scale_leaves_out(scale, exponent):
    """An update of spectral norm s * factor changes what a matrix puts out by as much; wanted is sqrt(out / in)."""
    from train.optim.muon import MuonScale

    wide = replace(
        BASE, **{size: 4 * getattr(BASE, size) for size in asdict(BASE) if size.endswith(("width", "hidden_size"))}
    )
    wide = replace(wide, head_dim=64)
    muon = frozenset(role for role in Role if role.is_matrix)
    found = carried(wide, replace(FOUND, muon=muon, muon_scale=scale))
    assert found.roles[Role.query].lr == pytest.approx(0.008 * 4**exponent)
    assert found.roles[Role.head].lr == pytest.approx(0.008 / 4), "AdamW has the rest"
    other = replace(wide, expert_hidden_size=8 * BASE.expert_hidden_size)  # another shape, too
    for role in (Role.expert_gate_up, Role.expert_down):
        lr = carried(other, replace(FOUND, muon=muon, muon_scale=scale)).roles[role].lr
        step = []
        for size, rate in ((BASE, 0.008), (other, lr)):
            rows, columns = (getattr(size, str(side)) for side in SPANS[role])
            step.append(rate * MuonScale(scale).factor(rows, columns) / math.sqrt(rows / columns))
        assert step[0] == pytest.approx(step[1]), role


def test_the_table_is_pinned():
    """A change of a rule is a change of `rules.VERSION` and of this file, which
    `python -c "from tests.hparam.test_transfer import *; GOLDEN.write_text(golden())"` writes."""
    assert json.loads(GOLDEN.read_text()) == json.loads(golden())


def golden() -> str:
    cases = {
        "adamw": carried(),
        "muon": carried(found=replace(FOUND, muon=frozenset(r for r in Role if r.is_matrix), muon_scale="match_adamw")),
        "multiplier head": carried(head=HeadForm.multiplier),
        "standard": carried(rules=Parametrization.standard),
    }
    return json.dumps({name: figures(found) for name, found in cases.items()}, indent=1) + "\n"


def test_a_digest_follows_every_figure():
    assert carried().digest == carried().digest
    changes = [
        carried(tokens_exponent=0.31),
        carried(replace(LARGER, num_layers=25)),
        carried(found=replace(FOUND, eps=2e-8)),
    ]
    assert len({carried().digest, *(one.digest for one in changes)}) == 4


def test_what_is_not_established_is_said():
    assert (
        "sparsity changes (2 of 16 experts at the base, 8 of 128 here)"
        in carried(replace(LARGER, num_experts=128)).warnings[0]
    )
    assert not any("sparsity" in line for line in carried().warnings)
    fine = replace(LARGER, expert_hidden_size=256)
    assert any("experts are 0.125 times as wide" in line for line in carried(fine).warnings)
    assert any("critical batch is not known" in line for line in carried(replace(BASE, batch=2**21)).warnings)
    assert any(
        "the base is small" in line
        for line in transfer(HparamConfig(base=replace(BASE, hidden_size=64)), LARGER, FOUND).warnings
    )


def test_steps_above_the_critical_batch_are_refused_unless_told():
    """2^20 tokens at the base, and 16^0.46 = 3.6 times as many for 16 times the tokens."""
    assert carried(critical_batch=2.0**20)
    with pytest.raises(
        ConfigError, match=r"global_batch_size: a step of 4,194,304 tokens is above the critical batch of 3,7"
    ):
        carried(replace(LARGER, batch=2**22), critical_batch=2.0**20)
    assert carried(replace(LARGER, batch=2**22), critical_batch=2.0**20, allow_supercritical=True)


@pytest.mark.parametrize("size", ["dense_hidden_size", "shared_expert_hidden_size", "num_experts"])
def test_a_base_lacks_what_the_target_has(size):
    with pytest.raises(
        ConfigError, match=rf"hparam.base.{size}=0: the base has none, and this model has .*: sweep a base"
    ):
        transfer(HparamConfig(base=replace(BASE, **{size: 0})), LARGER, FOUND)


def test_a_tied_head_has_no_absorbed_form():
    with pytest.raises(ConfigError, match=r"hparam.head=absorbed: tied embeddings have one table .*; try multiplier"):
        carried(found=replace(FOUND, tied=True))
    assert carried(found=replace(FOUND, tied=True), head=HeadForm.multiplier).multipliers.logits == 0.25


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(**SIZES, expert_hidden_size=40, shared_expert_hidden_size=24, num_experts=4, moe_every=2),
        ModelConfig(**{**SIZES, "num_layers": 2}, moe_every=0, layer_list=[LayerConfig(), LayerConfig(rope=False)]),
    ],
    ids=["mixture", "dense"],
)
def test_matrices_are_what_their_roles_say(model):
    scale = scale_of(model, 1024, 10240)
    check_registry(parameter_infos(model), scale)
    assert scale.query_width == 64 and scale.value_width == 32 and scale.steps == 10
    with pytest.raises(TypeError, match=r"attention.query.weight is .* as its role query says"):
        check_registry(parameter_infos(model), replace(scale, query_width=32))
