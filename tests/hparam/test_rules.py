"""The rules parse as written, cover every role and use known sizes only."""

from __future__ import annotations

import itertools

import pytest

from hparam.rules import MULTIPLIERS, MUON, HeadForm, Parametrization, Power, monomial, table, value
from model.roles import Role


def test_powers_are_read_as_written():
    assert monomial("1") == ()
    assert monomial("fan_in^-1/2 num_layers^a-1 num_experts^-1") == (
        Power("fan_in", -0.5),
        Power("num_layers", -1.0, 1),
        Power("num_experts", -1.0),
    )
    assert monomial("num_layers^-a") == (Power("num_layers", 0.0, -1),)
    ratios = {"fan_in": 4.0, "num_layers": 8.0, "num_experts": 2.0}
    assert value(monomial("fan_in^-1/2 num_layers^a-1 num_experts^-1"), ratios, 1.0) == 0.25
    assert value(monomial("num_layers^a-1 num_layers^-a"), ratios, 0.5) == pytest.approx(1 / 8)


@pytest.mark.parametrize("rules", Parametrization)
@pytest.mark.parametrize("head", HeadForm)
def test_every_role_has_a_rule(rules, head):
    assert table(rules, head).keys() == set(Role)


def test_only_known_sizes_are_scaled_by():
    sizes = {"hidden_size", "num_layers", "num_experts", "top_k", "head_dim", "fan_in", "fan_out", "larger"}
    tables = [table(*choice).values() for choice in itertools.product(Parametrization, HeadForm)]
    monomials = [part for rules in tables for rule in rules for part in (rule.std, rule.lr, rule.eps)]
    monomials += [monomial(text) for by in (MUON, *MULTIPLIERS.values()) for text in by.values()]
    assert {power.size for one in monomials for power in one} <= sizes


def test_standard_rules_have_one_learning_rate():
    assert all(rule.lr == () and rule.eps == () for rule in table(Parametrization.standard, HeadForm.absorbed).values())
