"""Transfer hyperparameters from a base to a target of another size. Sizes are those of whole models, not of shards, so
the result does not depend on the layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from core.errors import ConfigError
from hparam import rules
from hparam.config import HparamConfig
from hparam.rules import HeadForm, Parametrization, monomial, value
from hparam.scale import SPANS, Scale, ratios
from model.config import MultipliersConfig
from model.roles import Role

CRITICAL_EXPONENT = 0.46
LEAST_BETA2, MOST_BETA2 = 0.9, 0.9999
DIGITS = 10
"""Significant digits to which results are rounded, because platforms differ in the last digits of a power."""


@dataclass(frozen=True)
class BaseHyperparameters:
    """Values at the base, by role. `muon`: the roles that Muon trains."""

    std: Mapping[Role, float]
    lr: Mapping[Role, float]
    weight_decay: Mapping[Role, float]
    eps: float
    beta2: float
    muon: frozenset[Role] = frozenset()
    muon_scale: str = "unit_rms_norm"
    sums_gates: bool = False
    """Whether the sum of a token's routing weights grows with top_k, as for unnormalised sigmoids."""
    tied: bool = False


@dataclass(frozen=True)
class RoleValues:
    """`std` is None for gains and biases, which start at 1 and 0."""

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
    """Timescale of the matrices' weight decay, see `HparamConfig.tau`; None without decay."""
    warnings: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Digest of all values and the version of the rules."""
        roles = {role.name: asdict(values) for role, values in self.roles.items()}
        content = {"version": rules.VERSION, "roles": roles, "beta2": self.beta2}
        content["multipliers"] = asdict(self.multipliers)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def transfer(config: HparamConfig, target: Scale, found: BaseHyperparameters) -> Resolved:
    """Compute the values for `target`. Raises `ConfigError` if the rules do not cover it."""
    base = config.base
    assert base is not None
    _check(config, base, target, found)
    general = ratios(base, target)
    carries = config.rules is Parametrization.metap  # standard rules keep one learning rate
    noise = general["batch"] ** config.batch_exponent * general["tokens"] ** -config.tokens_exponent if carries else 1.0
    table, alpha = rules.table(config.rules, config.head), config.alpha
    roles = {}
    for role in found.lr:
        own, rule = ratios(base, target, role), table[role]
        by_muon = role in found.muon and carries
        rate = monomial(rules.MUON[found.muon_scale]) if by_muon else rule.lr
        lr = _rounded(found.lr[role] * noise * value(rate, own, alpha))
        std = None if role.initial_constant is not None else _rounded(found.std[role] * value(rule.std, own, alpha))
        eps = _rounded(found.eps / noise * value(rule.eps, own, alpha))
        decay = _decay(config, found, role, lr, base, target) if carries else found.weight_decay[role]
        roles[role] = RoleValues(std, lr, eps, decay)
    beta2 = found.beta2
    if carries:  # keep the half-life of beta2 in tokens
        beta2 = _rounded(min(MOST_BETA2, max(min(LEAST_BETA2, beta2), beta2 ** general["batch"])))
    matrix = next((role for role in found.lr if role.is_matrix and found.weight_decay[role] * found.lr[role]), None)
    tau = None if matrix is None else 1 / (roles[matrix].lr * roles[matrix].weight_decay * target.steps)
    said = list(warnings(config, base, target))
    if carries and (exact := found.beta2 ** general["batch"]) and abs(exact - beta2) > 1e-9 * exact:
        said.append(f"beta2 would be {exact:.6g} for the base's half-life in tokens; it is limited to {beta2:.6g}")
    return Resolved(roles, beta2, _multipliers(config, general, found), tau, tuple(said))


def _decay(
    config: HparamConfig, found: BaseHyperparameters, role: Role, lr: float, base: Scale, target: Scale
) -> float:
    """Return the weight decay with which lr * weight decay * steps is 1 / tau (`config.tau`, or else the base's)."""
    if not found.weight_decay[role] or not lr:
        return 0.0
    inverse_tau = 1 / config.tau if config.tau else found.lr[role] * found.weight_decay[role] * base.steps
    return _rounded(inverse_tau / (lr * target.steps))


def _multipliers(config: HparamConfig, general: Mapping[str, float], found: BaseHyperparameters) -> MultipliersConfig:
    chosen = dict(rules.MULTIPLIERS[config.rules.value])
    if config.rules is Parametrization.metap:
        if config.head is HeadForm.multiplier:
            chosen["logits"] = rules.LOGITS_WITH_MULTIPLIER
        if found.sums_gates:
            chosen["gates"] = rules.GATES_NOT_NORMALISED
    factors = {key: value(monomial(rule), general, config.alpha) for key, rule in chosen.items()}
    return MultipliersConfig(**{key: _rounded(getattr(config.multipliers, key) * one) for key, one in factors.items()})


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _check(config: HparamConfig, base: Scale, target: Scale, found: BaseHyperparameters) -> None:
    if config.tau is not None and not any(found.weight_decay.values()):
        reason = "the base has no weight decay: set optimizer.weight_decay, or remove tau"
        raise ConfigError("hparam.tau", config.tau, reason)
    if found.tied and config.head is HeadForm.absorbed and config.rules is Parametrization.metap:
        reason = "tied embeddings share one matrix, which cannot be initialised as a head"
        raise ConfigError("hparam.head", config.head, reason, [HeadForm.multiplier.value])
    for size in ("dense_hidden_size", "shared_expert_hidden_size", "num_experts"):
        if getattr(target, size) and not getattr(base, size):
            reason = f"the base has none, but this model has {getattr(target, size)}: sweep a base that has one"
            raise ConfigError(f"hparam.base.{size}", 0, reason)
    if config.critical_batch is not None and not config.allow_supercritical:
        critical = config.critical_batch * (target.tokens / base.tokens) ** CRITICAL_EXPONENT
        if target.batch > critical:
            reason = f"{target.batch:,} tokens are above this run's critical batch of {critical:,.0f} tokens"
            advice = "take a smaller batch, or set hparam.allow_supercritical=true"
            raise ConfigError("training.global_batch_size", None, f"{reason}; {advice}")


def warnings(config: HparamConfig, base: Scale, target: Scale) -> tuple[str, ...]:
    """Return a warning, with the remedy, for each change of size over which transfer is not established."""
    found, both = [], ratios(base, target)
    if "num_experts" in both:
        if abs(both["top_k"] / both["num_experts"] - 1) > 1e-9:
            before, now = (f"{scale.top_k} of {scale.num_experts}" for scale in (base, target))
            found.append(
                f"sparsity changes ({before} experts at the base, {now} here): sweep optimizer.groups.ROLE.lr_scale "
                "again for router, expert_gate_up and expert_down"
            )
        granularity = both["expert_hidden_size"] / both["hidden_size"]
        if not 0.5 <= granularity <= 2:
            found.append(
                f"expert_hidden_size / hidden_size is {granularity:.3g} times the base's: sweep "
                "optimizer.groups.ROLE.lr_scale again for expert_gate_up and expert_down"
            )
    if target.vision_hidden_size and not base.vision_hidden_size:
        found.append(
            "the base has no vision encoder, so nothing scales the encoder's values: sweep "
            "optimizer.groups.ROLE.lr_scale for the roles vision_*, adapter_* and projector"
        )
    if base.hidden_size < 256 or base.num_layers < 4:
        size = f"{base.num_layers} layers of hidden size {base.hidden_size}"
        found.append(f"the base is small ({size}): its optimum may not transfer")
    if config.critical_batch is None and both["batch"] > max(1.0, both["tokens"]) ** CRITICAL_EXPONENT:
        found.append(
            f"the batch is {both['batch']:.3g} times the base's for {both['tokens']:.3g} times its tokens, and the "
            "critical batch is unknown (hparam.critical_batch): the learning rate may be too high"
        )
    if both["tokens"] > 100:
        advice = "measure hparam.tokens_exponent (leviathan metap fit) before a long run"
        found.append(f"the run has {both['tokens']:.3g} times the base's tokens: {advice}")
    return tuple(found)


def spans(role: Role) -> str:
    """Return "fan in -> fan out" of a role's matrix, or "gain" or "bias", as text for tables."""
    if role not in SPANS:
        return "gain" if role.initial_constant else "bias"
    out, into = SPANS[role]
    return f"{into} -> {out or 'vocabulary'}"
