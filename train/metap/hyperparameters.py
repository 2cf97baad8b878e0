"""Derive a run's hyperparameters from those of its base at every start, and compare them with the stored ones.

The base is the size at which they were tuned. In a run with a base, `optimizer` and `model.init` hold the values
for the base. The derived values are stored next to them (`optimizer.transferred`, `model.init.roles`,
`model.multipliers`, `hparam.table`), so that the configuration shows every value and an edited value is detected.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from operator import attrgetter
from typing import Any

from core.config import differences, plain
from core.errors import ConfigError
from hparam.scale import Scale, check_registry, fan_in, kind_of, scale_of
from hparam.transfer import BaseHyperparameters, Resolved, transfer
from model.config import ModelConfig, MultipliersConfig
from model.roles import Role
from train.config import TrainConfig, phases
from train.optim.config import SLOWEST_IN_BFLOAT16, Moments, OptimizerConfig, OptimizerKind, RoleConfig, Transferred

TOLERANCE = 1e-9
_DERIVED: dict[str, Any] = {
    "model.multipliers": MultipliersConfig(),
    "model.init.roles": {},
    "optimizer.transferred": None,
    "hparam.table": None,
}
"""Keys of derived values, each with its value before derivation."""


def derive(config: TrainConfig) -> Resolved:
    """Derive the run's values from the base's by the rules. Raises `ConfigError` if the rules do not cover this run."""
    from model.tensor_source import parameter_infos  # imports torch

    assert config.hparam.base is not None
    infos = parameter_infos(config.model)
    target = scale_of_run(config)
    check_registry(infos, target)
    roles = list(dict.fromkeys(info.role for info in infos.values()))
    return transfer(config.hparam, target, found_at(config.hparam.base, roles, config.model, config.optimizer))


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the configuration with derived values filled in, or unchanged if it has no base.

    Raises `ConfigError` for a stored value that differs from the derived one.
    """
    if config.hparam.base is None:
        for key in ("optimizer.transferred", "hparam.table"):
            if attrgetter(key)(config) is not None:
                raise ConfigError(key, None, "is derived from hparam.base, which is missing; remove it or set the base")
        return config
    if config.optimizer.kind is OptimizerKind.sgd:
        reason = "there are rules for adamw and muon only; use hparam=none with SGD"
        raise ConfigError("hparam.base", None, reason)
    here = kind_of(config.model)
    for key, there in config.hparam.kind.items():
        if here.get(key, there) != there:
            reason = f"the base of the hyperparameters has these, but this model has {here[key]}, and no rule transfers"
            advice = "add hparam=none to use optimizer.* as it is, or sweep a base of this kind (leviathan metap sweep)"
            raise ConfigError(f"hparam.kind.{key}", there, f"{reason}: {advice}")
    found = derive(config)
    if config.optimizer.moments is Moments.bfloat16 and found.beta2 > SLOWEST_IN_BFLOAT16:
        reason = f"bfloat16 moments lose updates as slow as beta2={found.beta2:.4g}, which this batch size requires"
        raise ConfigError("optimizer.moments", config.optimizer.moments, reason, [Moments.float32.value])
    roles = {role.name: RoleConfig(own.lr, own.eps, own.weight_decay) for role, own in found.roles.items()}
    spreads = {role.name: own.std for role, own in found.roles.items() if own.std is not None}
    optimizer = replace(config.optimizer, transferred=Transferred(found.beta2, roles))
    init = replace(config.model.init, roles=spreads)
    model = replace(config.model, init=init, multipliers=found.multipliers)
    hparam = replace(config.hparam, table=found.digest)
    filled = replace(config, model=model, optimizer=optimizer, hparam=hparam)
    _compare(config, filled)
    return filled


def warnings(config: TrainConfig) -> tuple[str, ...]:
    """Return a warning, with advice, for each difference from the base across which transfer is not established."""
    return () if config.hparam.base is None else derive(config).warnings


def without_derived(config: TrainConfig) -> TrainConfig:
    """Return the configuration without derived values, as the user set it."""
    if config.hparam.base is None:
        return config
    model = replace(config.model, init=replace(config.model.init, roles={}), multipliers=MultipliersConfig())
    optimizer, hparam = replace(config.optimizer, transferred=None), replace(config.hparam, table=None)
    return replace(config, model=model, optimizer=optimizer, hparam=hparam)


def _compare(given: TrainConfig, derived: TrainConfig) -> None:
    """Reject a stored value that differs from the derived one."""
    for key, default in _DERIVED.items():
        old, new = (attrgetter(key)(config) for config in (given, derived))
        if old == default:
            continue
        for leaf, (was, now) in differences(plain(old), plain(new), key).items():
            if isinstance(was, float) and isinstance(now, float) and abs(was - now) <= TOLERANCE * abs(now):
                continue
            reason = (
                f"the rules derive {now} for this run; it was edited, or a setting that it depends on was changed: "
                "remove it and change the value at the base, or run `leviathan metap transfer` again"
            )
            raise ConfigError(leaf, was, reason)


def scale_of_run(config: TrainConfig) -> Scale:
    """Return the size of the run's first phase. Later phases do not count: they may be added at any time."""
    first = phases(config)[0]
    batch = first.global_batch_size * first.seq_len
    return scale_of(config.model, batch, batch * first.stop)


def as_base(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the run itself as its base. If it has a base, only remove its derived values."""
    if config.hparam.base is not None:
        return without_derived(config)
    base, multipliers = scale_of_run(config), config.model.multipliers
    hparam = replace(config.hparam, base=base, kind=kind_of(config.model), multipliers=multipliers)
    return without_derived(replace(config, hparam=hparam))


def found_at(base: Scale, roles: list[Role], model: ModelConfig, optimizer: OptimizerConfig) -> BaseHyperparameters:
    """Return the values that `model.init` and `optimizer` give each role in a model of the base's size."""
    from model.init import role_std  # imports torch
    from model.router_scores import grows_with_top_k

    sizes, init = dataclasses.asdict(base), replace(model.init, roles={})
    own = dataclasses.asdict(scale_of(model, 1, 1))
    random = [role for role in roles if role.initial_constant is None]
    return BaseHyperparameters(
        std={role: role_std(role, fan_in(role, sizes) or fan_in(role, own), base.num_layers, init) for role in random},
        lr={role: optimizer.peak_lr(role) for role in roles},
        weight_decay={role: optimizer.decay(role) for role in roles},
        eps=optimizer.eps,
        beta2=optimizer.beta2,
        muon=frozenset(role for role in roles if optimizer.by_muon(role)),
        muon_scale=optimizer.muon.scale.value,
        sums_gates=model.has_experts and grows_with_top_k(model.router),
        tied=model.tie_embeddings,
    )
