"""A run with a base: every transferred value is stored, derived again at each start, and used."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from core.config import build, load_stored, plain
from core.errors import ConfigError
from core.overrides import quoted
from hparam.axes import SizeAxis
from hparam.rules import HeadForm, Parametrization
from model.config import MultipliersConfig
from parallel.comm.world import World
from parallel.layout import ParallelConfig
from parallel.mesh import make_meshes
from parallel.parallelize import build as build_model
from tests.support.families import family, text
from train.config import PhaseConfig, TrainConfig
from train.engine.fsdp import TorchEngine
from train.metap.hyperparameters import as_base, derive, resolve, scale_of_run, without_derived
from train.metap.scaling import carried, grown_run
from train.optim.config import Moments
from train.run_directory import RunDirectory


def larger(*overrides: str, **hparam: Any) -> TrainConfig:
    """Return an unresolved run that is twice as wide as its base."""
    base = family("model.init.head_std=0.02", "model.init.router_std=0.05", "optimizer.weight_decay=0.1", *overrides)
    wide = grown_run(base, SizeAxis.width, 2)
    return replace(wide, hparam=replace(wide.hparam, base=scale_of_run(base), **hparam))


def test_a_resolved_run_resolves_to_itself():
    run = resolve(larger())
    assert run.optimizer.transferred is not None
    assert run.optimizer.transferred.roles["query"].lr == pytest.approx(run.optimizer.lr / 2)
    assert run.model.init.roles["query"] == pytest.approx((2 * 64) ** -0.5)
    assert run.model.init.roles["router"] == pytest.approx(0.025)
    again = build(TrainConfig, plain(run))
    assert resolve(again) == again == run
    assert without_derived(run) == larger()


def test_without_a_base_nothing_is_changed():
    run = family()
    assert resolve(run) is run
    with pytest.raises(ConfigError, match=r"hparam.table: is derived from hparam.base, which is missing"):
        resolve(replace(run, hparam=replace(run.hparam, table="0123")))
    transferred = resolve(larger()).optimizer
    with pytest.raises(ConfigError, match=r"optimizer.transferred: is derived from hparam.base"):
        resolve(replace(run, optimizer=transferred))


def edited(run: TrainConfig, key: str, value: float | str) -> TrainConfig:
    return load_stored(plain(run), TrainConfig, [f"{key}={quoted(value) if isinstance(value, str) else value}"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("optimizer.transferred.roles.router.lr", 0.01),
        ("model.init.roles.expert_down", 0.02),
        ("model.multipliers.residual", 0.5),
        ("hparam.table", "0000000000000000"),
    ],
)
def test_an_edited_value_is_rejected_by_name(key, value):
    resolved = resolve(larger())
    with pytest.raises(ConfigError, match=rf"^{key}={value}: the rules derive .* it was edited"):
        resolve(edited(resolved, key, value))
    with pytest.raises(ConfigError, match=r"a setting that it depends on was changed"):
        resolve(edited(resolved, "training.steps", 2 * resolved.training.steps))


@pytest.mark.parametrize(
    "overrides, hparam, message",
    [
        (["model.tie_embeddings=true"], {}, r"hparam.head=absorbed.*try multiplier"),
        (["optimizer.kind=sgd"], {}, r"hparam.base: there are rules for adamw and muon only; .*hparam=none"),
        (["optimizer.weight_decay=0"], {"tau": 0.1}, r"tau=0.1: the base has no weight decay"),
        ([], {"tau": 0.1, "rules": Parametrization.standard}, r"tau=0.1"),
        ([], {"alpha": 0.1}, r"alpha=0.1"),
        (
            [],
            {"kind": {"score": "sigmoid"}},
            r"hparam.kind.score=.*this model has softmax, and no rule transfers: add hparam=none",
        ),
    ],
)
def test_impossible_transfers_are_rejected(overrides, hparam, message):
    with pytest.raises(ConfigError, match=message):
        resolve(larger(*overrides, **hparam))


def test_a_base_stores_its_kind():
    assert as_base(family("model.qk_norm=per_head")).hparam.kind["norms"] == "per_head"
    tied = resolve(larger("model.tie_embeddings=true", head=HeadForm.multiplier))
    assert tied.model.multipliers.logits == 0.5


def test_values_of_a_base_are_those_of_its_size():
    """Depth scaling uses the base's layers, and unnormalised gates are scaled by top-k. Phases change no size."""
    base = family("model.init.depth_scaled=true", "model.router.score=sigmoid", "model.router.norm_topk_prob=false")
    deep = carried(base, SizeAxis.depth, 4, Parametrization.metap)
    assert deep.model.init.roles["attention_output"] == pytest.approx(64**-0.5 / 2)
    assert carried(base, SizeAxis.experts, 2, Parametrization.metap).model.multipliers.gates == 0.5
    assert carried(family(), SizeAxis.experts, 2, Parametrization.metap).model.multipliers.gates == 1.0
    phase = PhaseConfig("later", 7, seq_len=32, global_batch_size=2)
    assert scale_of_run(replace(base, phases=[phase])) == scale_of_run(base)


def test_beta2_keeps_its_half_life_in_tokens():
    base = family("training.global_batch_size=16", "training.steps=10")
    small = replace(base, training=replace(base.training, global_batch_size=2, steps=80), hparam=as_base(base).hparam)
    assert resolve(small).optimizer.transferred.beta2 == pytest.approx(0.95 ** (1 / 8))  # type: ignore[union-attr]
    low = replace(small, optimizer=replace(base.optimizer, moments=Moments.bfloat16))
    with pytest.raises(ConfigError, match=r"optimizer.moments=bfloat16: .* as slow as beta2=0.9936, .*; try float32"):
        resolve(low)
    eight = replace(base, training=replace(base.training, global_batch_size=128), hparam=as_base(base).hparam)
    assert any("beta2 would be 0.66" in line for line in derive(eight).warnings)


def test_multipliers_of_a_base_are_kept():
    base = family("model.multipliers.logits=0.7")
    assert carried(base, SizeAxis.width, 2, Parametrization.metap).model.multipliers.logits == 0.7
    run = resolve(larger(multipliers=MultipliersConfig(logits=0.7), alpha=1.0))
    assert run.model.multipliers == MultipliersConfig(logits=0.7)


def test_a_run_resumes_with_its_own_values_only(tmp_path, monkeypatch):
    """A changed setting is reported before the values that depend on it."""
    run = resolve(larger(f"run.root={tmp_path}", "run.name=x", "training.steps=100"))
    directory = RunDirectory.of(run)
    directory.open(run)
    monkeypatch.setattr("train.run_directory.committed", lambda path: [(2, path)])
    directory.check(run)
    with pytest.raises(ConfigError, match=r"^training.steps=200: the run in .* was started with 100"):
        directory.check(resolve(larger(f"run.root={tmp_path}", "run.name=x", "training.steps=200")))


def engine(config: TrainConfig) -> TorchEngine:
    world = World(0, 1, torch.device("cpu"))
    meshes = make_meshes(ParallelConfig().resolve(1), world)
    return TorchEngine(build_model(config.model, config.precision, meshes, world.device, 0), config.optimizer)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_use_the_transferred_values(kind):
    run = resolve(larger(f"optimizer.kind={kind}"))
    found, wanted = engine(run), run.optimizer.transferred
    assert wanted is not None
    assert {group["name"] for group in found.optimizer.param_groups} == set(wanted.roles)
    for group in found.optimizer.param_groups:
        own = wanted.roles[group["name"]]
        assert (group["lr"], group["eps"], group["weight_decay"]) == (own.lr, own.eps, own.weight_decay)
        if "betas" in group:
            assert group["betas"] == (0.9, wanted.beta2)
    for name, spec in found.placed.specs.items():
        if spec.info.role.initial_constant is None:
            std = found.placed.model.get_parameter(name).std().item()
            assert std == pytest.approx(run.model.init.roles[spec.info.role.name], rel=0.1), name


def test_both_forms_of_the_head_train_alike():
    """Compare three steps of AdamW with decay, in float64. Control: half the learning rate of the head."""
    runs = {form: resolve(larger("precision=fp64", "optimizer.lr=0.01", head=form)) for form in HeadForm}
    absorbed, multiplier = (trained(runs[form]) for form in (HeadForm.absorbed, HeadForm.multiplier))
    assert multiplier == pytest.approx(absorbed, rel=1e-9)
    run = runs[HeadForm.multiplier]
    broken = edited(run, "optimizer.transferred.roles.head.lr", run.optimizer.transferred.roles["head"].lr / 2)  # type: ignore[union-attr]
    assert trained(broken)[-1] != pytest.approx(absorbed[-1], rel=1e-6), "control"


def trained(run: TrainConfig, steps: int = 3) -> list[float]:
    found, batch = engine(run), text()
    losses = []
    for _ in range(steps):
        losses.append(found.forward_backward(batch, len(batch.tokens_BT)).item())
        found.step(1.0)
    return losses


@pytest.mark.parametrize(
    "axis, sizes",
    [
        (SizeAxis.width, {"hidden_size", "query_width", "value_width", "expert_hidden_size"}),
        (SizeAxis.depth, {"num_layers"}),
        (SizeAxis.experts, {"num_experts", "top_k"}),
        (SizeAxis.batch, {"batch"}),
        (SizeAxis.tokens, {"tokens"}),
    ],
)
def test_families_grow_along_one_axis(axis, sizes):
    base = family("schedule.warmup_steps=10", "training.steps=100")
    grown = grown_run(base, axis, 2)
    small, large = (asdict(scale_of_run(run)) for run in (base, grown))
    assert {key: large[key] / small[key] for key in small if large[key] != small[key]} == dict.fromkeys(sizes, 2)
    assert grown.schedule.warmup_steps / grown.training.steps == 0.1


def test_a_batch_must_divide_the_steps():
    with pytest.raises(ConfigError, match=r"training.steps=101: must be a multiple of 4"):
        grown_run(family("training.steps=101"), SizeAxis.batch, 4)
