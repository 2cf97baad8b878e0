"""The optimizer over named groups, one per role, so that learning rate and decay can be set by what a parameter is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError, check_numbers
from model.roles import Role
from model.transformer import Transformer
from parallel.deepspeed.offload import PagedAdamW
from parallel.mesh import Meshes
from parallel.sharding import ShardSpec, local
from parallel.whole_matrices import rounds
from precision.config import PrecisionConfig
from train.optim.muon import Muon, MuonConfig

SLOWEST_IN_BFLOAT16 = 0.99
"""bf16 has 8 significant bits: a moment that moves by less than 1/256 a step stands still."""


class OptimizerKind(Enum):
    adamw = "adamw"
    muon = "muon"
    """Matrices between hidden states by Muon, all else by AdamW: see `train.optim.muon`."""
    sgd = "sgd"
    """Plain, without momentum: shows the scale of gradients, which AdamW hides. Its weight decay is coupled (L2), added
    after clipping: w - lr * (g + decay * w), which without momentum is what decoupled decay does.
    """


class Moments(Enum):
    float32 = "float32"
    """As wide as the master weights."""
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class GroupConfig:
    """What a role changes: a factor on the learning rate, its own weight decay (null: the optimizer's)."""

    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("lr_scale", "weight_decay"))


@dataclass(frozen=True)
class RoleConfig:
    """What parameters of a role use."""

    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Transferred:
    """What was carried over from a base (`train.metap.hyperparameters`), by role, in place of the optimizer's own."""

    beta2: float
    roles: dict[str, RoleConfig]


@dataclass(frozen=True)
class OptimizerConfig:
    """`lr` is the peak. `groups` is keyed by role (`embedding`, `router`, `expert_down`, ...). Norms never decay."""

    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    moments: Moments = Moments.float32
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Read by kind=muon only."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    transferred: Transferred | None = None
    """Written by MetaP; null: all of the above is meant for this run as it is."""

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
        """The format of the state that is kept per element; None where there is none."""
        if self.kind is OptimizerKind.sgd:
            return None
        return torch.bfloat16 if self.moments is Moments.bfloat16 else precision.master_dtype

    def by_muon(self, role: Role) -> bool:
        """Whether parameters of this role are Muon's."""
        return self.kind is OptimizerKind.muon and role.is_matrix

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta1, self.beta2 if self.transferred is None else self.transferred.beta2

    def of(self, role: Role) -> RoleConfig:
        """What this run's parameters of this role use."""
        if self.transferred is not None:
            return self.transferred.roles[role.name]
        return RoleConfig(self.peak_lr(role), self.eps, self.decay(role))

    def peak_lr(self, role: Role) -> float:
        """As found at the base, where there is one."""
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
    """One group per role, with `name`, `peak_lr` and its parameters in the model's order."""
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
    """One of torch's parameter groups per role: `name`, `peak_lr`, and its parameters in the model's order."""
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
    """AdamW or, where that is configured, plain SGD: what does not care how parameters are cut."""
    if config.kind is OptimizerKind.sgd:
        return torch.optim.SGD(groups, lr=config.lr)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.moments is Moments.bfloat16:
        return AdamWLowMoments(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def set_learning_rate(groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Every group at `factor` times its peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that a first step would make, so that a checkpoint can be loaded into it."""
    if isinstance(optimizer, torch.optim.SGD | PagedAdamW):  # no state; its own already
        return
    if isinstance(optimizer, Muon):
        optimizer.prime()
        optimizer = optimizer.rest
    dtype = torch.bfloat16 if isinstance(optimizer, AdamWLowMoments) else None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                optimizer.state[parameter] = _fresh_state(parameter, dtype)


def _fresh_state(parameter: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
    }


class AdamWLowMoments(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) that stores both moments in bfloat16 and computes in fp32."""

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter not in self.state:
                    self.state[parameter] = _fresh_state(parameter, torch.bfloat16)
                self._update(local(parameter), local(parameter.grad), self.state[parameter], group)

    def _update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state["step"] += 1
        first = local(state["exp_avg"]).to(grad.dtype).lerp_(grad, 1 - beta1)
        second = local(state["exp_avg_sq"]).to(grad.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        local(state["exp_avg"]).copy_(first)
        local(state["exp_avg_sq"]).copy_(second)
        correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        denominator = (second / correction2).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(first.div_(denominator).mul_(group["lr"] / correction1))
