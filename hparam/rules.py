"""Define scaling rules as data: how initial standard deviation, learning rate and epsilon of each role scale.

`metap` is Leviathan's own set of rules; Meta has not published its rules. It combines CompleteP (Dey et al. 2025, arXiv
2505.01618, table 1), Adam's epsilons from Complete(d)P (arXiv 2512.22382, table 1), and the rules for experts at fixed
sparsity from the Maximally Scale-Stable Parameterization (arXiv 2605.14200). The router starts small instead of at
zero, because exact ties send every token to the same experts. The vision encoder has the rules of width alone, because
its residual stream has no multiplier for depth. `standard` is common practice: standard deviation by
fan-in, smaller residual branches in deeper models, and one learning rate.

A rule is a product of ratios target / base, each to a power. `a` is `HparamConfig.alpha`. `fan_in`, `fan_out` and
`larger` (the larger of the two) are sizes of the role's matrix. If target and base are equal, every rule gives 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import cache

from model.roles import Role

VERSION = 1

METAP = """
role                        std             lr                             eps
embedding                   1               1                              hidden_size^-1
query key value             fan_in^-1/2     fan_in^-1 num_layers^a-1       hidden_size^-1 num_layers^-a
query_down query_up         fan_in^-1/2     fan_in^-1 num_layers^a-1       hidden_size^-1 num_layers^-a
latent_down latent_up       fan_in^-1/2     fan_in^-1 num_layers^a-1       hidden_size^-1 num_layers^-a
attention_output            fan_in^-1/2     fan_in^-1 num_layers^a-1       hidden_size^-1 num_layers^-a
dense_gate dense_up         fan_in^-1/2     fan_in^-1 num_layers^a-1       hidden_size^-1 num_layers^-a
dense_down                  fan_in^-1/2     fan_in^-1 num_layers^a-1       hidden_size^-1 num_layers^-a
shared_gate shared_up       fan_in^-1/2     fan_in^-1 num_layers^a-1       hidden_size^-1 num_layers^-a
shared_down                 fan_in^-1/2     fan_in^-1 num_layers^a-1       hidden_size^-1 num_layers^-a
expert_gate_up expert_down  fan_in^-1/2     fan_in^-1 num_layers^a-1       hidden_size^-1 num_layers^-a num_experts^-1
router                      hidden_size^-1  hidden_size^-1 num_layers^a-1  num_layers^-a num_experts^-1
block_norm                  1               num_layers^a-1                 hidden_size^-1 num_layers^-a
qk_norm                     1               num_layers^a-1                 num_layers^-a
latent_norm                 1               num_layers^a-1                 hidden_size^-1 num_layers^-a
final_norm                  1               1                              1
head                        hidden_size^-1  hidden_size^-1                 1
vision_patch                1               1                              vision_hidden_size^-1
vision_position             fan_in^-1/2     1                              vision_hidden_size^-1
vision_norm vision_bias     1               1                              vision_hidden_size^-1
vision_query vision_key     fan_in^-1/2     fan_in^-1                      vision_hidden_size^-1
vision_value vision_output  fan_in^-1/2     fan_in^-1                      vision_hidden_size^-1
vision_up vision_down       fan_in^-1/2     fan_in^-1                      vision_hidden_size^-1
adapter_in adapter_out      fan_in^-1/2     fan_in^-1                      vision_hidden_size^-1
projector                   fan_in^-1/2     fan_in^-1                      hidden_size^-1
logit_scale logit_bias      1               1                              1
"""
HEAD_WITH_MULTIPLIER = """
role  std  lr  eps
head  1    1   hidden_size^-1
"""
STANDARD = """
role                                         std                          lr  eps
embedding block_norm qk_norm final_norm      1                            1   1
latent_norm                                  1                            1   1
query_down query_up latent_down latent_up    fan_in^-1/2                  1   1
query key value dense_gate dense_up          fan_in^-1/2                  1   1
shared_gate shared_up expert_gate_up router  fan_in^-1/2                  1   1
attention_output dense_down                  fan_in^-1/2 num_layers^-1/2  1   1
shared_down expert_down                      fan_in^-1/2 num_layers^-1/2  1   1
head                                         fan_in^-1/2                  1   1
vision_patch vision_norm vision_bias         1                            1   1
vision_position vision_query vision_key      fan_in^-1/2                  1   1
vision_value vision_output vision_up         fan_in^-1/2                  1   1
vision_down adapter_in adapter_out           fan_in^-1/2                  1   1
projector                                    fan_in^-1/2                  1   1
logit_scale logit_bias                       1                            1   1
"""
MUON = {
    "unit_rms_norm": "num_layers^a-1",
    "shape_scaling": "fan_out^1/2 larger^-1/2 num_layers^a-1",
    "match_adamw": "fan_out^1/2 fan_in^-1/2 larger^-1/2 num_layers^a-1",
}
"""Learning rate of matrices under Muon, by `muon.scale`. Without that scale, Muon's update has spectral norm 1
(`train.optim.muon`). The rule makes a step's spectral norm proportional to sqrt(fan_out / fan_in) (Yang et al. 2023,
arXiv 2310.17813).
"""
MULTIPLIERS = {
    "metap": {"residual": "num_layers^-a", "attention": "head_dim^-1/2", "logits": "1", "gates": "1"},
    "standard": {"residual": "1", "attention": "1", "logits": "1", "gates": "1"},
}
LOGITS_WITH_MULTIPLIER = "hidden_size^-1"
GATES_NOT_NORMALISED = "top_k^-1"
"""Multiplier of sigmoid gates without normalisation, because their sum over a token's experts grows with top_k."""


class Parametrization(Enum):
    metap = "metap"
    """Leviathan's rules: the best learning rate of the base stays the best one in larger models."""
    standard = "standard"
    """For comparison: one learning rate, standard deviation by fan-in."""


class HeadForm(Enum):
    """How the logits get a factor 1 / hidden_size: `absorbed` in the head's standard deviation and learning rate, or a
    `multiplier` on the logits, which tied embeddings need. Training is the same with both.
    """

    absorbed = "absorbed"
    multiplier = "multiplier"


@dataclass(frozen=True)
class Power:
    """The factor ratio ** (constant + depth * a), with the ratio target / base of `size`."""

    size: str
    constant: float
    depth: int = 0


Monomial = tuple[Power, ...]


@dataclass(frozen=True)
class Rule:
    std: Monomial
    lr: Monomial
    eps: Monomial


def monomial(text: str) -> Monomial:
    """Parse text such as `fan_in^-1 num_layers^a-1`; `1` gives no powers."""
    return () if text == "1" else tuple(_power(word) for word in text.split())


def _power(word: str) -> Power:
    [(size, depth, constant)] = re.findall(r"(\w+)\^(-?a)?(.*)", word)
    return Power(size, float(Fraction(constant or "0")), {"a": 1, "-a": -1, "": 0}[depth])


def value(powers: Monomial, ratios: Mapping[str, float], alpha: float) -> float:
    return math.prod(ratios[one.size] ** (one.constant + one.depth * alpha) for one in powers)


@cache
def table(parametrization: Parametrization, head: HeadForm) -> Mapping[Role, Rule]:
    """Return the rule of every role under AdamW."""
    if parametrization is Parametrization.standard:
        return _parse(STANDARD)
    return {**_parse(METAP), **(_parse(HEAD_WITH_MULTIPLIER) if head is HeadForm.multiplier else {})}


def _parse(text: str) -> dict[Role, Rule]:
    head, *lines = text.strip().splitlines()
    starts = [head.index(name) for name in ("std", "lr", "eps")]
    rules = {}
    for line in lines:
        ends = [*starts[1:], len(line)]
        cells = [monomial(line[start:end].strip()) for start, end in zip(starts, ends, strict=True)]
        rules.update({Role[name]: Rule(*cells) for name in line[: starts[0]].split()})
    return rules
