"""What each parameter is. MetaP, precision, weight decay and sharding ask the role, never the name.

Roles live in a registry keyed by name: attributes on a Parameter are lost by `fully_shard`, `deepcopy` and `to_empty`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from precision.config import Products


class Role(Enum):
    embedding = "embedding"
    head = "head"
    block_norm = "block_norm"
    final_norm = "final_norm"
    qk_norm = "qk_norm"
    query = "query"
    key = "key"
    value = "value"
    attention_output = "attention_output"
    dense_gate = "dense_gate"
    dense_up = "dense_up"
    dense_down = "dense_down"
    shared_gate = "shared_gate"
    shared_up = "shared_up"
    shared_down = "shared_down"
    expert_gate_up = "expert_gate_up"
    expert_down = "expert_down"
    router = "router"

    @property
    def is_norm(self) -> bool:
        return self in (Role.block_norm, Role.final_norm, Role.qk_norm)

    @property
    def is_expert(self) -> bool:
        return self in (Role.expert_gate_up, Role.expert_down)

    @property
    def is_matrix(self) -> bool:
        """Whether it maps hidden states to hidden states: its last two dimensions are a matrix [out, in], those before
        count matrices. The embedding is a table, the head and the router give scores, gains are vectors.
        """
        return not self.is_norm and self not in (Role.embedding, Role.head, Role.router)

    @property
    def products(self) -> Products | None:
        """Which group of matrix products it takes part in; None: norms take part in none."""
        return _PRODUCTS.get(self)

    @property
    def writes_residual(self) -> bool:
        """Whether its product is added to the residual stream."""
        return self in (Role.attention_output, Role.dense_down, Role.shared_down, Role.expert_down)


_PRODUCTS = {
    Role.embedding: Products.embedding,
    Role.head: Products.head,
    Role.router: Products.router,
    **dict.fromkeys((Role.query, Role.key, Role.value, Role.attention_output), Products.attention),
    **dict.fromkeys((Role.dense_gate, Role.dense_up, Role.dense_down), Products.dense),
    **dict.fromkeys((Role.shared_gate, Role.shared_up, Role.shared_down), Products.shared),
    **dict.fromkeys((Role.expert_gate_up, Role.expert_down), Products.expert),
}


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter as the whole model knows it: its role and its global shape, whatever part of it a rank stores."""

    name: str
    role: Role
    shape: torch.Size

    @property
    def fan_in(self) -> int:
        return self.shape[-1]


def registry(model: nn.Module) -> dict[str, ParameterInfo]:
    """Every parameter of an unwrapped model by name, in the model's order.

    A module that owns parameters says their roles in `roles`, local parameter name -> Role; a parameter without a role
    is an error, since nothing would know how to initialise, decay or scale it.
    """
    found: dict[str, ParameterInfo] = {}
    for prefix, module in model.named_modules():
        roles: Mapping[str, Role] = getattr(module, "roles", {})
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            if local not in roles:
                raise TypeError(f"{name} has no role: give {type(module).__name__} a `roles` entry for {local!r}")
            found[name] = ParameterInfo(name, roles[local], parameter.shape)
    return found
