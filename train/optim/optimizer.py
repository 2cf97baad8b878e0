"""Make the optimizer with a parameter group per role, so that learning rate and weight decay can differ by role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from model.roles import Role
from model.vision.towers import Network
from parallel.deepspeed.offload import PagedAdamW
from parallel.mesh import Meshes
from parallel.sharding import ShardSpec
from parallel.whole_matrices import rounds
from train.optim.adamw_bf16 import AdamWBF16, fresh_state
from train.optim.config import Moments, OptimizerConfig, OptimizerKind
from train.optim.muon import Muon


def make_optimizer(
    model: Network, specs: Mapping[str, ShardSpec], config: OptimizerConfig, meshes: Meshes
) -> torch.optim.Optimizer:
    """Make the optimizer of this rank's parameters, with the groups of `role_groups`."""
    everything = role_groups(model, specs, config)
    if config.kind is not OptimizerKind.muon:
        return elementwise(everything, config)
    matrices = [group for group in everything if config.by_muon(Role[group["name"]])]
    rest = elementwise([group for group in everything if not config.by_muon(Role[group["name"]])], config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {name: p for name, p in trained.items() if config.by_muon(specs[name].info.role)}
    # ranks of all pipeline stages keep the encoder equal, so the matrices beside which one is updated must be the same
    apart = [name for name in hidden if specs[name].info.role.is_vision and meshes.layout.encodes_ahead]
    parts = [names for names in ([name for name in hidden if name not in apart], apart) if names]
    plan = [one for names in parts for one in rounds({name: specs[name] for name in names}, meshes)]
    moments = torch.bfloat16 if config.moments is Moments.bfloat16 else None
    return Muon(matrices, rest, hidden, plan, config.muon, config.muon.format(model.compute_dtype), moments)


def role_groups(model: Network, specs: Mapping[str, ShardSpec], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return a parameter group per role, with its `name`, `peak_lr` and parameters in the model's order. The group of
    a frozen role is empty: a rank may have frozen parameters only, and torch's optimizers need a group.
    """
    by_role: dict[Role, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        by_role.setdefault(specs[name].info.role, []).extend([parameter] if parameter.requires_grad else [])
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
    fused = torch.optim.AdamW(groups, fused=True, **options)
    fused.register_step_post_hook(_new_versions)
    return fused


def _new_versions(optimizer: torch.optim.Optimizer, *args: Any) -> None:
    """Give parameters a new version, as any other write in place does: the fused step does not (torch 2.13). Copies of
    weights are refreshed when their version has changed.
    """
    increment_version(parameter for group in optimizer.param_groups for parameter in group["params"])


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
