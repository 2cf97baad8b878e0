"""A run with a base: every figure in its configuration, derived again at each start, and used."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from core.config import build, plain
from core.errors import ConfigError
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
from train.optim.optimizer import Moments
from train.report.page import repeat_command
from train.run_directory import RunDirectory


def larger(*overrides: str, **hparam: object) -> TrainConfig:
    """Twice as wide as its base, unresolved."""
    base = family("model.init.head_std=0.02", "model.init.router_std=0.05", "optimizer.weight_decay=0.1", *overrides)
    wide = grown_run(base, SizeAxis.width, 2)
    return replace(wide, hparam=replace(wide.hparam, base=scale_of_run(base), **hparam))  # type: ignore[arg-type]


def test_a_resolved_run_says_everything_and_resolves_to_itself():
    run = resolve(larger())
    assert run.optimizer.transferred is not None
    assert run.optimizer.transferred.roles["query"].lr == pytest.approx(run.optimizer.lr / 2)
    assert run.model.init.roles["query"] == pytest.approx((2 * 64) ** -0.5)
    assert run.model.init.roles["router"] == pytest.approx(0.025)
    again = build(TrainConfig, plain(run))
    assert resolve(again) == again == run
    assert without_derived(run) == larger()


def test_without_a_base_nothing_is_touched():
    run = family()
    assert resolve(run) is run
    with pytest.raises(ConfigError, match=r"hparam.table: is derived from hparam.base, which is missing"):
        resolve(replace(run, hparam=replace(run.hparam, table="0123")))
    transferred = resolve(larger()).optimizer
    with pytest.raises(ConfigError, match=r"optimizer.transferred: is derived from hparam.base"):
        resolve(replace(run, optimizer=transferred))


def edited(run: TrainConfig, key: str, value: object) -> TrainConfig:
    tree = plain(run)
    *path, last = key.split(".")
    place = tree
    for name in path:
        place = place[name]
    place[last] = value
    return build(TrainConfig, tree)


@pytest.mark.parametrize(
    "key, value",
    [
        ("optimizer.transferred.roles.router.lr", 0.01),
        ("optimizer.transferred.roles.head.eps", 1e-7),
        ("optimizer.transferred.beta2", 0.99),
        ("model.init.roles.expert_down", 0.02),
        ("model.multipliers.residual", 0.5),
        ("hparam.table", "0000000000000000"),
    ],
)
def test_a_hand_edited_figure_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=rf"^{key}={value}: the rules find .* edited by hand"):
        resolve(edited(resolve(larger()), key, value))


def test_what_figures_follow_from_was_changed_since():
    run = resolve(larger())
    with pytest.raises(ConfigError, match=r"was changed since"):
        resolve(replace(run, training=replace(run.training, steps=2 * run.training.steps)))


def test_tied_embeddings_need_the_multiplier():
    with pytest.raises(ConfigError, match=r"hparam.head=absorbed.*try multiplier"):
        resolve(larger("model.tie_embeddings=true"))
    tied = resolve(larger("model.tie_embeddings=true", head=HeadForm.multiplier))
    assert tied.model.multipliers.logits == 0.5


def test_what_the_base_gives_is_that_of_its_size():
    """Depth divides by the layers of the base, gates that nothing normalises by their number, phases by nothing."""
    base = family("model.init.depth_scaled=true", "model.router.score=sigmoid", "model.router.norm_topk_prob=false")
    deep = carried(base, SizeAxis.depth, 4, Parametrization.metap)
    assert deep.model.init.roles["attention_output"] == pytest.approx(64**-0.5 / 2)
    assert carried(base, SizeAxis.experts, 2, Parametrization.metap).model.multipliers.gates == 0.5
    assert carried(family(), SizeAxis.experts, 2, Parametrization.metap).model.multipliers.gates == 1.0
    phase = PhaseConfig("later", 7, seq_len=32, global_batch_size=2)
    assert scale_of_run(replace(base, phases=[phase])) == scale_of_run(base)


def test_a_smaller_batch_forgets_as_many_tokens():
    base = family("training.global_batch_size=16", "training.steps=10")
    small = replace(base, training=replace(base.training, global_batch_size=2, steps=80), hparam=as_base(base).hparam)
    assert resolve(small).optimizer.transferred.beta2 == pytest.approx(0.95 ** (1 / 8))  # type: ignore[union-attr]
    low = replace(small, optimizer=replace(base.optimizer, moments=Moments.bfloat16))
    with pytest.raises(ConfigError, match=r"optimizer.moments=bfloat16: .* as slow as beta2=0.9936, .*; try float32"):
        resolve(low)
    eight = replace(base, training=replace(base.training, global_batch_size=128), hparam=as_base(base).hparam)
    assert any("beta2 would be 0.66" in line for line in derive(eight).warnings)


@pytest.mark.parametrize("override", ["model.router.score=sigmoid", "model.qk_norm=per_head"])
def test_another_kind_of_model_is_refused(override):
    base = as_base(family())
    other = replace(family(override), hparam=base.hparam)
    with pytest.raises(ConfigError, match=r"hparam.kind.(score|norms)=.*no rule leads there from this model's"):
        resolve(other)


def test_factors_of_a_base_are_kept():
    base = family("model.multipliers.logits=0.7")
    assert carried(base, SizeAxis.width, 2, Parametrization.metap).model.multipliers.logits == 0.7


@pytest.mark.parametrize("hparam", [{"tau": 0.1}, {"tau": 0.1, "rules": Parametrization.standard}, {"alpha": 0.1}])
def test_what_would_do_nothing_is_refused(hparam):
    with pytest.raises(ConfigError, match=r"tau=0.1|alpha=0.1"):
        resolve(larger("optimizer.weight_decay=0", **hparam))


def test_a_repeat_command_says_what_the_user_said(tmp_path):
    command = repeat_command(resolve(larger()))
    assert command is not None and "hparam.base" in command and "transferred" not in command


def test_a_run_goes_on_with_its_own_figures_only(tmp_path, monkeypatch):
    """What follows from a changed setting is told after the setting."""
    run = resolve(larger(f"run.root={tmp_path}", "run.name=x", "training.steps=100"))
    directory = RunDirectory.of(run)
    directory.open(run)
    monkeypatch.setattr("train.run_directory.committed", lambda path: [(2, path)])
    directory.open(run)
    with pytest.raises(ConfigError, match=r"^training.steps=200: the run in .* was started with 100"):
        directory.open(resolve(larger(f"run.root={tmp_path}", "run.name=x", "training.steps=200")))


def test_there_are_no_rules_for_plain_sgd():
    with pytest.raises(ConfigError, match=r"hparam.base: there are rules for adamw and muon; .*hparam=none"):
        resolve(larger("optimizer.kind=sgd"))


def engine(config: TrainConfig) -> TorchEngine:
    world = World(0, 1, torch.device("cpu"))
    meshes = make_meshes(ParallelConfig().resolve(1), world)
    return TorchEngine(build_model(config.model, config.precision, meshes, world.device, 0), config.optimizer)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_use_what_was_carried_over(kind):
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
        if not spec.info.role.is_norm:
            std = found.placed.model.get_parameter(name).std().item()
            assert std == pytest.approx(run.model.init.roles[spec.info.role.name], rel=0.1), name


def test_both_forms_of_the_head_are_the_same_training():
    """In float64, five steps of AdamW, with decay; broken by a rate that is not divided."""
    losses = {}
    for form in HeadForm:
        run = resolve(larger("precision=fp64", "optimizer.lr=0.01", head=form))
        losses[form.value] = trained(run)
    assert losses["multiplier"] == pytest.approx(losses["absorbed"], rel=1e-9)
    run = resolve(larger("precision=fp64", "optimizer.lr=0.01", head=HeadForm.multiplier))
    broken = edited(run, "optimizer.transferred.roles.head.lr", run.optimizer.transferred.roles["head"].lr / 2)  # type: ignore[union-attr]
    assert trained(broken)[-1] != pytest.approx(losses["absorbed"][-1], rel=1e-6), "control"


def trained(run: TrainConfig, steps: int = 5) -> list[float]:
    found, batch = engine(run), text()
    losses = []
    for _ in range(steps):
        losses.append(found.forward_backward(batch, len(batch.tokens_BT)).item())
        found.step(1.0)
    return losses


def test_multipliers_at_the_base_are_kept():
    run = resolve(larger(multipliers=MultipliersConfig(logits=0.7), alpha=1.0))
    assert run.model.multipliers == MultipliersConfig(logits=0.7)


@pytest.mark.parametrize("axis", SizeAxis)
def test_families_grow_along_one_axis(axis):
    base = family("schedule.warmup_steps=10", "training.steps=100")
    small, large = scale_of_run(base), scale_of_run(grown_run(base, axis, 2))
    grown = {
        key: after / before
        for (key, before), after in zip(asdict(small).items(), asdict(large).values(), strict=True)
        if after != before
    }
    wanted = {
        SizeAxis.width: {"hidden_size", "query_width", "value_width", "expert_hidden_size"},
        SizeAxis.depth: {"num_layers"},
        SizeAxis.experts: {"num_experts", "top_k"},
        SizeAxis.batch: {"batch"},
        SizeAxis.tokens: {"tokens"},
    }
    assert grown == dict.fromkeys(wanted[axis], 2)
    schedule, training = (getattr(grown_run(base, axis, 2), key) for key in ("schedule", "training"))
    assert schedule.warmup_steps / training.steps == 0.1


def test_a_batch_that_does_not_divide_the_steps_is_refused():
    with pytest.raises(ConfigError, match=r"training.steps=101: must be a multiple of 4"):
        grown_run(family("training.steps=101"), SizeAxis.batch, 4)


def test_the_standard_way_changes_spreads_only():
    run = carried(
        family("training.steps=64", "optimizer.weight_decay=0.1"), SizeAxis.tokens, 4, Parametrization.standard
    )
    assert run.optimizer.transferred is not None and run.optimizer.transferred.beta2 == 0.95
    assert {own.lr for own in run.optimizer.transferred.roles.values()} == {run.optimizer.lr}
    assert {own.weight_decay for own in run.optimizer.transferred.roles.values()} == {0.0, 0.1}


def test_a_parameter_without_a_role_is_an_error(monkeypatch):
    from model.layers import RMSNorm

    init = RMSNorm.__init__

    def forgetful(self, *arguments, **named):
        init(self, *arguments, **named)
        self.roles = {}

    monkeypatch.setattr(RMSNorm, "__init__", forgetful)
    with pytest.raises(TypeError, match=r"has no role"):
        derive(larger())
