"""Make the optimizer with a parameter group per role, so that learning rate and weight decay can differ by role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from core.errors import ConfigError, check_numbers
from model.roles import Role
from model.transformer import Transformer
from parallel.deepspeed.offload import PagedAdamW
from parallel.mesh import Meshes
from parallel.sharding import ShardSpec
from parallel.whole_matrices import rounds
from precision.config import PrecisionConfig
from train.optim.adamw_bf16 import AdamWBF16, fresh_state
from train.optim.muon import Muon, MuonConfig

SLOWEST_IN_BFLOAT16 = 0.99
"""Largest beta of a bf16 moment. bf16 has 8 significant bits: relative changes below 1/256 per step are lost."""


class OptimizerKind(Enum):
    adamw = "adamw"
    muon = "muon"
    """Muon for matrices between hidden states, AdamW for the rest: see `train.optim.muon`."""
    sgd = "sgd"
    """Plain SGD without momentum. Unlike AdamW's, its updates show the scale of gradients. Weight decay is L2, added
    after clipping: w - lr * (g + decay * w).
    """


class Moments(Enum):
    float32 = "float32"
    """The moments have the dtype of the master weights, which is float32 by default."""
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class GroupConfig:
    """Settings of one role: a factor on the learning rate, and a weight decay (null: that of the optimizer)."""

    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("lr_scale", "weight_decay"))


@dataclass(frozen=True)
class RoleConfig:
    """The hyperparameters of a role in this run."""

    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Transferred:
    """Hyperparameters transferred from a base (`train.metap.hyperparameters`), which replace the optimizer's own."""

    beta2: float
    roles: dict[str, RoleConfig]


@dataclass(frozen=True)
class OptimizerConfig:
    """`lr` is the peak learning rate. `groups` is keyed by role (`embedding`, `router`, `expert_down`, ...). Norms have
    no weight decay.
    """

    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    moments: Moments = Moments.float32
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Used with kind=muon only."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    transferred: Transferred | None = None
    """Set by MetaP, not by the user. Null: the settings above apply to this run unchanged."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("lr", "eps"), not_negative=("weight_decay",))
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must lie in [0, 1)")
        slow = {"beta2": self.beta2}
        if self.kind is OptimizerKind.muon:
            slow["muon.momentum"] = self.muon.momentum
        for key, decay in slow.items():
            if self.moments is Moments.bfloat16 and decay > SLOWEST_IN_BFLOAT16:
                reason = "bfloat16 moments lose updates this slow; use at most 0.99, or moments=float32"
                raise ConfigError(key, decay, reason, [0.95, 0.99])
        roles = [role.name for role in Role]
        for name in self.groups:
            if name not in roles:
                raise ConfigError(f"groups.{name}", None, "no such role", roles)

    def moments_dtype(self, precision: PrecisionConfig) -> torch.dtype | None:
        """Return the dtype of the moments, or None for an optimizer without state."""
        if self.kind is OptimizerKind.sgd:
            return None
        return torch.bfloat16 if self.moments is Moments.bfloat16 else precision.master_dtype

    def by_muon(self, role: Role) -> bool:
        """Return whether Muon updates parameters of this role."""
        return self.kind is OptimizerKind.muon and role.is_matrix

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta1, self.beta2 if self.transferred is None else self.transferred.beta2

    def of(self, role: Role) -> RoleConfig:
        """Return the hyperparameters of this role in this run."""
        if self.transferred is not None:
            return self.transferred.roles[role.name]
        return RoleConfig(self.peak_lr(role), self.eps, self.decay(role))

    def peak_lr(self, role: Role) -> float:
        """Return the peak learning rate of a role, before any transfer."""
        base = self.muon.lr if self.by_muon(role) and self.muon.lr is not None else self.lr
        return base * self.groups.get(role.name, GroupConfig()).lr_scale

    def decay(self, role: Role) -> float:
        if role.is_norm:
            return 0.0
        own = self.groups.get(role.name, GroupConfig()).weight_decay
        return self.weight_decay if own is None else own


def make_optimizer(
    model: Transformer, specs: Mapping[str, ShardSpec], config: OptimizerConfig, meshes: Meshes
) -> torch.optim.Optimizer:
    """Make the optimizer of this rank's parameters, with the groups of `role_groups`."""
    everything = role_groups(model, specs, config)
    if config.kind is not OptimizerKind.muon:
        return elementwise(everything, config)
    matrices = [group for group in everything if config.by_muon(Role[group["name"]])]
    rest = elementwise([group for group in everything if not config.by_muon(Role[group["name"]])], config)
    hidden = {name: p for name, p in model.named_parameters() if config.by_muon(specs[name].info.role)}
    plan = rounds({name: specs[name] for name in hidden}, meshes)
    moments = torch.bfloat16 if config.moments is Moments.bfloat16 else None
    return Muon(matrices, rest, hidden, plan, config.muon, config.muon.format(model.compute_dtype), moments)


def role_groups(model: Transformer, specs: Mapping[str, ShardSpec], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return a parameter group per role, with its `name`, `peak_lr` and parameters in the model's order."""
    by_role: dict[Role, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        by_role.setdefault(specs[name].info.role, []).append(parameter)
    groups = []
    for role, parameters in by_role.items():
        own = config.of(role)
        group = {"params": parameters, "name": role.name, "lr": own.lr, "peak_lr": own.lr, "eps": own.eps}
        groups.append({**group, "weight_decay": own.weight_decay})
    return groups


def elementwise(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make AdamW or plain SGD, whose updates do not depend on how parameters are sharded."""
    if config.kind is OptimizerKind.sgd:
        return torch.optim.SGD(groups, lr=config.lr)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.moments is Moments.bfloat16:
        return AdamWBF16(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def set_learning_rate(groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the optimizer state before the first step, so that a checkpoint can be loaded into it."""
    if isinstance(optimizer, torch.optim.SGD | PagedAdamW):  # no state, or state that is already allocated
        return
    if isinstance(optimizer, Muon):
        optimizer.prime()
        optimizer = optimizer.rest
    dtype = torch.bfloat16 if isinstance(optimizer, AdamWBF16) else None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                optimizer.state[parameter] = fresh_state(parameter, dtype)
