"""Hyperparameters found at a base, carried over to a target of another size. Sizes are those of whole models, so every
layout finds the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from core.errors import ConfigError
from hparam.config import HparamConfig
from hparam.rules import (
    GATES_NOT_NORMALISED,
    LOGITS_WITH_MULTIPLIER,
    MULTIPLIERS,
    MUON,
    VERSION,
    HeadForm,
    Parametrization,
    monomial,
    table,
    value,
)
from hparam.scale import SPANS, Scale, ratios
from model.config import MultipliersConfig
from model.roles import Role

CRITICAL_EXPONENT = 0.46
LEAST_BETA2, MOST_BETA2 = 0.9, 0.9999
DIGITS = 10
"""Significant digits that are kept: platforms differ in the last ones of a power."""


@dataclass(frozen=True)
class BaseHyperparameters:
    """What is used at the base, by role. `muon`: the roles whose matrices are Muon's, with its scale."""

    std: Mapping[Role, float]
    lr: Mapping[Role, float]
    weight_decay: Mapping[Role, float]
    eps: float
    beta2: float
    muon: frozenset[Role] = frozenset()
    muon_scale: str = "unit_rms_norm"
    sums_gates: bool = False
    """Whether a token's routing weights are sigmoids that nothing divides by their sum."""
    tied: bool = False


@dataclass(frozen=True)
class RoleValues:
    """`std` None: a norm, which begins at 1."""

    std: float | None
    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Resolved:
    roles: dict[Role, RoleValues]
    beta2: float
    multipliers: MultipliersConfig
    tau: float | None
    """At the learning rate and decay of the base's matrices; None: nothing decays."""
    warnings: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of every figure, and of the version of the rules."""
        roles = {role.name: asdict(values) for role, values in sorted(self.roles.items(), key=lambda one: one[0].name)}
        content = {"version": VERSION, "roles": roles, "beta2": self.beta2, "multipliers": asdict(self.multipliers)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def transfer(config: HparamConfig, target: Scale, found: BaseHyperparameters) -> Resolved:
    """What `target` is to use. Raises `ConfigError` where the rules have no answer."""
    base = config.base
    assert base is not None
    _check(config, base, target, found)
    general = ratios(base, target)
    carries = config.rules is Parametrization.metap  # the standard way has one rate, whatever the batch and the run
    noise = general["batch"] ** config.batch_exponent * general["tokens"] ** -config.tokens_exponent if carries else 1.0
    rules, alpha = table(config.rules, config.head), config.alpha
    roles = {}
    for role in found.lr:
        own, rule = ratios(base, target, role), rules[role]
        by_muon = role in found.muon and carries
        rate = monomial(MUON[found.muon_scale]) if by_muon else rule.lr
        lr = _kept(found.lr[role] * noise * value(rate, own, alpha))
        std = None if role.is_norm else _kept(found.std[role] * value(rule.std, own, alpha))
        eps = _kept(found.eps / noise * value(rule.eps, own, alpha))
        decay = _decay(config, found, role, lr, base, target) if carries else found.weight_decay[role]
        roles[role] = RoleValues(std, lr, eps, decay)
    beta2 = found.beta2
    if carries:  # as many tokens until half is forgotten
        beta2 = _kept(min(MOST_BETA2, max(min(LEAST_BETA2, beta2), beta2 ** general["batch"])))
    matrix = next((role for role in found.lr if role.is_matrix and found.weight_decay[role] * found.lr[role]), None)
    tau = None if matrix is None else 1 / (roles[matrix].lr * roles[matrix].weight_decay * target.steps)
    said = list(warnings(config, base, target))
    if carries and (exact := found.beta2 ** general["batch"]) and abs(exact - beta2) > 1e-9 * exact:
        said.append(f"beta2 would be {exact:.6g} to forget as many tokens as at the base; it is kept at {beta2:.6g}")
    return Resolved(roles, beta2, _multipliers(config, general, found), tau, tuple(said))


def _decay(
    config: HparamConfig, found: BaseHyperparameters, role: Role, lr: float, base: Scale, target: Scale
) -> float:
    """As much forgetting over the whole run as at the base: lr * decay * steps is the same, 1 / tau."""
    if not found.weight_decay[role] or not lr:
        return 0.0
    forgets = 1 / config.tau if config.tau else found.lr[role] * found.weight_decay[role] * base.steps
    return _kept(forgets / (lr * target.steps))


def _multipliers(config: HparamConfig, general: Mapping[str, float], found: BaseHyperparameters) -> MultipliersConfig:
    rules = dict(MULTIPLIERS[config.rules.value])
    if config.rules is Parametrization.metap:
        if config.head is HeadForm.multiplier:
            rules["logits"] = LOGITS_WITH_MULTIPLIER
        if found.sums_gates:
            rules["gates"] = GATES_NOT_NORMALISED
    factors = {key: value(monomial(rule), general, config.alpha) for key, rule in rules.items()}
    return MultipliersConfig(**{key: _kept(getattr(config.multipliers, key) * one) for key, one in factors.items()})


def _kept(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _check(config: HparamConfig, base: Scale, target: Scale, found: BaseHyperparameters) -> None:
    if config.tau is not None and not any(found.weight_decay.values()):
        raise ConfigError("hparam.tau", config.tau, "nothing decays at the base: set optimizer.weight_decay, or no tau")
    if found.tied and config.head is HeadForm.absorbed and config.rules is Parametrization.metap:
        reason = "tied embeddings have one table for both ends, whose spread cannot be the head's"
        raise ConfigError("hparam.head", config.head, reason, [HeadForm.multiplier.value])
    for size in ("dense_hidden_size", "shared_expert_hidden_size", "num_experts"):
        if getattr(target, size) and not getattr(base, size):
            reason = f"the base has none, and this model has {getattr(target, size)}: sweep a base that has one"
            raise ConfigError(f"hparam.base.{size}", 0, reason)
    if config.critical_batch is not None and not config.allow_supercritical:
        critical = config.critical_batch * (target.tokens / base.tokens) ** CRITICAL_EXPONENT
        if target.batch > critical:
            reason = (
                f"a step of {target.batch:,} tokens is above the critical batch of {critical:,.0f} for this run, where "
                f"the learning rate no longer follows its root; take smaller steps, or hparam.allow_supercritical=true"
            )
            raise ConfigError("training.global_batch_size", None, reason)


def warnings(config: HparamConfig, base: Scale, target: Scale) -> tuple[str, ...]:
    """Where carrying over is not established, and what to sweep again."""
    found = []
    both = ratios(base, target)
    if "num_experts" in both:
        sparsity = both["top_k"] / both["num_experts"]
        if abs(sparsity - 1) > 1e-9:
            shares = [f"{scale.top_k} of {scale.num_experts}" for scale in (base, target)]
            found.append(
                f"sparsity changes ({shares[0]} experts at the base, {shares[1]} here): sweep the learning rates of "
                "router and experts again (optimizer.groups.router.lr_scale, .expert_gate_up, .expert_down)"
            )
        granularity = both["expert_hidden_size"] / both["hidden_size"]
        if not 0.5 <= granularity <= 2:
            found.append(
                f"experts are {granularity:.3g} times as wide for the model's width as at the base: sweep the learning "
                "rate of experts again (optimizer.groups.expert_gate_up.lr_scale, .expert_down)"
            )
    if base.hidden_size < 256 or base.num_layers < 4:
        found.append(
            f"the base is small ({base.num_layers} layers of {base.hidden_size}): its optimum may not be the limit's"
        )
    if config.critical_batch is None and both["batch"] > max(1.0, both["tokens"]) ** CRITICAL_EXPONENT:
        found.append(
            f"steps are {both['batch']:.3g} times the base's for {both['tokens']:.3g} times its tokens, and the "
            "critical batch is not known (hparam.critical_batch): the learning rate may be too high"
        )
    if both["tokens"] > 100:
        found.append(
            f"the run has {both['tokens']:.3g} times the base's tokens: measure hparam.tokens_exponent "
            "(leviathan metap fit) before a long run"
        )
    return tuple(found)


def spans(role: Role) -> str:
    """How a matrix's sides read in a table: from -> to."""
    if role not in SPANS:
        return "gain"
    out, into = SPANS[role]
    return f"{into} -> {out or 'vocabulary'}"
