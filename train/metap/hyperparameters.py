"""Hyperparameters of a run that names a base: derived anew at every start, and compared where they stand written.

`optimizer` and `model.init` then say what was found at the base. What this run uses is written beside them
(`optimizer.transferred`, `model.init.roles`, `model.multipliers`, `hparam.table`), so that a run's configuration shows
every figure and a change to one of them is noticed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace

from core.config import differences, plain
from core.errors import ConfigError
from hparam.scale import SPANS, Scale, check_registry, kind_of, scale_of
from hparam.transfer import BaseHyperparameters, Resolved, transfer
from model.config import ModelConfig, MultipliersConfig, Score
from model.init import role_std
from model.roles import Role
from model.tensor_source import parameter_infos
from train.config import TrainConfig, phases
from train.optim.optimizer import SLOWEST_IN_BFLOAT16, Moments, OptimizerConfig, OptimizerKind, RoleConfig, Transferred

TOLERANCE = 1e-9


def derive(config: TrainConfig) -> Resolved:
    """What the rules make of the base's figures at this run's size. Raises `ConfigError` where they cannot."""
    assert config.hparam.base is not None
    infos = parameter_infos(config.model)
    target = scale_of_run(config)
    check_registry(infos, target)
    roles = list(dict.fromkeys(info.role for info in infos.values()))
    return transfer(config.hparam, target, found_at(config.hparam.base, roles, config.model, config.optimizer))


def resolve(config: TrainConfig) -> TrainConfig:
    """The run with what it uses filled in; itself where there is no base.

    Raises `ConfigError` where what stands there already is not what the rules find, figure by figure.
    """
    if config.hparam.base is None:
        if config.optimizer.transferred is not None or config.hparam.table is not None:
            key = "optimizer.transferred" if config.optimizer.transferred is not None else "hparam.table"
            raise ConfigError(key, None, "is derived from hparam.base, which is missing; remove it or name the base")
        return config
    if config.optimizer.kind is OptimizerKind.sgd:
        reason = "there are rules for adamw and muon; plain SGD takes its rate as it is: hparam=none"
        raise ConfigError("hparam.base", None, reason)
    here = kind_of(config.model)
    for key, there in config.hparam.kind.items():
        if here.get(key, there) != there:
            reason = f"no rule leads there from this model's, {here[key]}: sweep a base of its kind, or hparam=none"
            raise ConfigError(f"hparam.kind.{key}", there, reason)
    found = derive(config)
    if config.optimizer.moments is Moments.bfloat16 and found.beta2 > SLOWEST_IN_BFLOAT16:
        reason = f"bfloat16 moments lose updates as slow as beta2={found.beta2:.4g}, which follows from this batch"
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
    """Where carrying over is not established for this run, and what to sweep again."""
    return () if config.hparam.base is None else derive(config).warnings


def without_derived(config: TrainConfig) -> TrainConfig:
    """What the user has said of the run."""
    if config.hparam.base is None:
        return config
    model = replace(config.model, init=replace(config.model.init, roles={}), multipliers=MultipliersConfig())
    optimizer, hparam = replace(config.optimizer, transferred=None), replace(config.hparam, table=None)
    return replace(config, model=model, optimizer=optimizer, hparam=hparam)


def _compare(given: TrainConfig, derived: TrainConfig) -> None:
    """Refuse a figure that was written by a transfer and is not what it would be now."""
    for key, old, new, untouched in _written(given, derived):
        if old == untouched:
            continue
        for leaf, (was, now) in differences(plain(old), plain(new), key).items():
            if isinstance(was, float) and isinstance(now, float) and abs(was - now) <= TOLERANCE * abs(now):
                continue
            reason = (
                f"the rules find {now} for this run; it was edited by hand, or what it follows from was changed "
                "since: leave it out and set what is meant at the base, or run `leviathan metap transfer` again"
            )
            raise ConfigError(leaf, was, reason)


def _written(given: TrainConfig, derived: TrainConfig) -> Iterator[tuple[str, object, object, object]]:
    """Key, what stands there, what should, and what stands there where nobody has written anything."""
    yield "model.multipliers", given.model.multipliers, derived.model.multipliers, MultipliersConfig()
    yield "model.init.roles", given.model.init.roles, derived.model.init.roles, {}
    yield "optimizer.transferred", given.optimizer.transferred, derived.optimizer.transferred, None
    yield "hparam.table", given.hparam.table, derived.hparam.table, None


def scale_of_run(config: TrainConfig) -> Scale:
    """The size of this run's first phase: later ones may still be added, and have schedules of their own."""
    first = phases(config)[0]
    batch = first.global_batch_size * first.seq_len
    return scale_of(config.model, batch, batch * first.stop)


def as_base(config: TrainConfig) -> TrainConfig:
    """The run as the base of others; itself where it has a base. Its factors are then those at the base."""
    if config.hparam.base is not None:
        return without_derived(config)
    base, multipliers = scale_of_run(config), config.model.multipliers
    hparam = replace(config.hparam, base=base, kind=kind_of(config.model), multipliers=multipliers)
    return without_derived(replace(config, hparam=hparam))


def found_at(base: Scale, roles: list[Role], model: ModelConfig, optimizer: OptimizerConfig) -> BaseHyperparameters:
    """What `model.init` and `optimizer` give these roles in a model of the base's size."""
    sizes, init = dataclasses.asdict(base), replace(model.init, roles={})
    matrices = [role for role in roles if not role.is_norm]
    router = model.router
    return BaseHyperparameters(
        std={role: role_std(role, sizes[SPANS[role][1]] or 1, base.num_layers, init) for role in matrices},
        lr={role: optimizer.peak_lr(role) for role in roles},
        weight_decay={role: optimizer.decay(role) for role in roles},
        eps=optimizer.eps,
        beta2=optimizer.beta2,
        muon=frozenset(role for role in roles if optimizer.by_muon(role)),
        muon_scale=optimizer.muon.scale.value,
        sums_gates=model.has_experts and router.score is Score.sigmoid and not router.norm_topk_prob,
        tied=model.tie_embeddings,
    )
