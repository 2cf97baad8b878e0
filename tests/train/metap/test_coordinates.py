"""The coordinate check on small MoE models: what training changes does not depend on width, depth or experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from hparam import rules
from hparam.axes import SizeAxis
from hparam.coordinate_check import AxisResult, check_axis, slope
from hparam.rules import Parametrization
from tests.support.families import family, text
from train.config import TrainConfig
from train.metap.coordinates import changes
from train.metap.scaling import carried


def measure(base: TrainConfig, axis: SizeAxis, factor: int, seed: int, rules: Parametrization):
    run = carried(replace(base, run=replace(base.run, seed=seed)), axis, factor, rules)
    return changes(run, [text()] * 5, text())


def checked(axis: SizeAxis, factors: list[int], *overrides: str, seeds: int = 3) -> AxisResult:
    return check_axis(partial(measure, family(*overrides)), axis, factors, seeds, lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "muon, lr", [(None, 0.0078), ("unit_rms_norm", 0.02), ("shape_scaling", 0.02), ("match_adamw", 0.0078)]
)
def test_width(muon, lr):
    """Compare hidden sizes 64 to 512."""
    kind = [] if muon is None else ["optimizer.kind=muon", f"optimizer.muon.scale={muon}"]
    found = checked(SizeAxis.width, [1, 2, 4, 8], *kind, f"optimizer.lr={lr}")
    assert found.failures() == []
    ours, standard = found.slopes["metap"], found.slopes["standard"]
    assert abs(ours["residual"]) <= 0.15, ours
    assert max(abs(ours[name]) for name in ("attention", "moe", "logits")) <= 0.2, ours
    assert muon or standard["residual"] > 0.4, standard


@pytest.mark.slow
def test_depth():
    """Compare 2 to 16 layers."""
    found = checked(SizeAxis.depth, [1, 2, 4, 8], "optimizer.lr=0.002")
    assert found.failures() == []
    assert abs(found.slopes["metap"]["residual"]) <= 0.2 and found.slopes["standard"]["residual"] > 0.3, found.slopes


def test_experts():
    """Compare 8 and 32 experts, of which each token uses 2 and 8."""
    found = checked(SizeAxis.experts, [1, 4], "optimizer.lr=0.002")
    assert found.failures() == []
    assert max(abs(found.slopes["metap"][name]) for name in ("residual", "logits")) <= 0.2, found.slopes["metap"]


@pytest.mark.parametrize("axis, rule", [(SizeAxis.width, "fan_in^-1 num_layers^a-1"), (SizeAxis.depth, "residual")])
def test_a_missing_rule_is_detected(monkeypatch, axis, rule):
    """Without the rule of hidden matrices, or the residual factor, the check fails."""
    if rule == "residual":
        monkeypatch.setitem(rules.MULTIPLIERS["metap"], "residual", "1")
    else:
        monkeypatch.setattr(rules, "METAP", rules.METAP.replace(rule, "1 ".ljust(len(rule))))
    rules.table.cache_clear()
    try:
        found = checked(axis, [1, 4], "optimizer.lr=0.0078", seeds=1)
    finally:
        rules.table.cache_clear()
    assert any("the change of residual has slope" in line for line in found.failures()), found.slopes["metap"]


def test_an_inconclusive_check_fails():
    """If changes do not grow under standard rules either, the check says nothing about the rules."""
    flat = {name: [1.0, 1.1] for name in ("embedding", "attention", "moe", "router", "residual", "logits")}
    found = AxisResult(SizeAxis.width, [1, 2], {"metap": flat, "standard": flat}, {})
    assert [line.partition(",")[0] for line in found.failures()] == ["width: inconclusive"]
    steep = AxisResult(SizeAxis.width, [1, 2], {"metap": flat, "standard": {**flat, "residual": [1.0, 2.0]}}, {})
    assert steep.failures() == []


def test_slopes_of_powers_are_their_exponents():
    assert slope([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1.0)
    assert slope([1, 4], [8.0, 4.0]) == pytest.approx(-0.5)
    assert slope([1, 2], [1.0, 0.0]) != slope([1, 2], [1.0, 0.0]), "NaN, which passes no limit"
