"""Roles of parameters. MetaP, precision, weight decay and sharding depend on the role, never on the name.

Roles are kept in a registry by name, because `fully_shard`, `deepcopy` and `to_empty` lose attributes of a Parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from core.errors import ConfigError
from precision.config import Products

if TYPE_CHECKING:
    import torch
    from torch import nn


class Role(Enum):
    embedding = "embedding"
    head = "head"
    block_norm = "block_norm"
    final_norm = "final_norm"
    qk_norm = "qk_norm"
    query = "query"
    key = "key"
    value = "value"
    query_down = "query_down"
    """Latent attention: from hidden states to the vector from which queries are projected up."""
    query_up = "query_up"
    latent_down = "latent_down"
    """Latent attention: from hidden states to the vector for keys and values, and to the rotated part of keys."""
    latent_up = "latent_up"
    latent_norm = "latent_norm"
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
    vision_patch = "vision_patch"
    vision_position = "vision_position"
    """Learned positions and the class token of the vision encoder."""
    vision_norm = "vision_norm"
    vision_bias = "vision_bias"
    """Biases of the vision encoder's layer norms and matrices."""
    vision_query = "vision_query"
    vision_key = "vision_key"
    vision_value = "vision_value"
    vision_output = "vision_output"
    vision_up = "vision_up"
    vision_down = "vision_down"
    adapter_in = "adapter_in"
    adapter_out = "adapter_out"
    projector = "projector"
    logit_scale = "logit_scale"
    """Logarithm of the factor on the cosines of contrastive towers."""
    logit_bias = "logit_bias"
    """What is added to the scaled cosines of contrastive towers."""

    @property
    def is_vision(self) -> bool:
        """Whether the parameter belongs to the vision encoder, its adapter or its projector."""
        return self.value.startswith(("vision_", "adapter_", "projector"))

    @property
    def initial_constant(self) -> float | None:
        """The initial value of gains and biases; None for parameters that start with random values. A network may set
        another one: see `registry`.
        """
        if self in (Role.block_norm, Role.final_norm, Role.qk_norm, Role.latent_norm, Role.vision_norm):
            return 1.0
        return 0.0 if self in (Role.vision_bias, Role.logit_scale, Role.logit_bias) else None

    @property
    def is_logit(self) -> bool:
        """Whether the parameter turns cosines into logits. It belongs to no module that FSDP2 shards."""
        return self in (Role.logit_scale, Role.logit_bias)

    @property
    def is_expert(self) -> bool:
        return self in (Role.expert_gate_up, Role.expert_down)

    @property
    def is_matrix(self) -> bool:
        """Whether the parameter is a matrix [out, in] between hidden states, or a stack of such matrices.
        False for embedding, head, router, patches, positions, gains and biases.
        """
        outer = (Role.embedding, Role.head, Role.router, Role.vision_patch, Role.vision_position)
        return self.initial_constant is None and self not in outer

    @property
    def products(self) -> Products | None:
        """The group to which its matmul belongs; None for parameters that are not multiplied."""
        return _PRODUCTS.get(self)

    @property
    def writes_residual(self) -> bool:
        """Whether the output of its matmul is added to the residual stream."""
        return self in (Role.attention_output, Role.dense_down, Role.shared_down, Role.expert_down)


_PRODUCTS = {
    Role.embedding: Products.embedding,
    Role.head: Products.head,
    Role.router: Products.router,
    **dict.fromkeys((Role.query, Role.key, Role.value, Role.attention_output), Products.attention),
    **dict.fromkeys((Role.query_down, Role.query_up, Role.latent_down, Role.latent_up), Products.attention),
    **dict.fromkeys((Role.dense_gate, Role.dense_up, Role.dense_down), Products.dense),
    **dict.fromkeys((Role.shared_gate, Role.shared_up, Role.shared_down), Products.shared),
    **dict.fromkeys((Role.expert_gate_up, Role.expert_down), Products.expert),
    **dict.fromkeys(
        (
            *(Role.vision_patch, Role.vision_query, Role.vision_key, Role.vision_value, Role.vision_output),
            *(Role.vision_up, Role.vision_down, Role.adapter_in, Role.adapter_out, Role.projector),
        ),
        Products.vision,
    ),
}


GROUPS = {
    "vision": frozenset(role for role in Role if role.is_vision),
    "encoder": frozenset(role for role in Role if role.is_vision and role is not Role.projector),
    "decoder": frozenset(role for role in Role if not role.is_vision and not role.is_logit),
}
"""Names of several roles: the vision encoder with its adapter and projector, the same without the projector, and the
decoder. What turns cosines into logits belongs to neither tower.
"""


def roles_of(names: Iterable[str]) -> frozenset[Role]:
    """Return the roles with these names, each that of a role or of a group. Raises `ConfigError` for another name."""
    found: set[Role] = set()
    for name in names:
        if name not in GROUPS and name not in Role.__members__:
            raise ConfigError("", name, "no such role or group of roles", [*GROUPS, *Role.__members__])
        found |= GROUPS[name] if name in GROUPS else {Role[name]}
    return frozenset(found)


def check_freeze(freeze: list[str], there: AbstractSet[Role] | None = None) -> None:
    """Raise `ConfigError` for a name of no role or group. With the roles that the network has (`there`), also for a
    name of none of them, and if nothing is left to train.
    """
    try:
        roles_of(freeze)
    except ConfigError as error:
        raise error.under("freeze") from None
    if not freeze or there is None:
        return
    for name in freeze:
        if not there & roles_of([name]):
            reason = "the model has no such parameters"
            raise ConfigError("freeze", name, reason, [role.name for role in Role if role in there])
    if there <= roles_of(freeze):
        raise ConfigError("freeze", freeze, "leaves nothing to train: omit a role or a group")


@dataclass(frozen=True)
class ParameterInfo:
    """Role and global shape of a parameter, independent of the shard that a rank stores."""

    name: str
    role: Role
    shape: torch.Size
    constant: float | None = None
    """The initial value that the network sets, in place of the role's."""

    @property
    def initial_constant(self) -> float | None:
        """The initial value of all elements; None for random values."""
        return self.role.initial_constant if self.constant is None else self.constant

    @property
    def fan_in(self) -> int:
        return self.shape[-1]


def registry(model: nn.Module) -> dict[str, ParameterInfo]:
    """Return every parameter of an unwrapped model by name, in the model's order.

    Each module has a dict `roles` from the local names of its parameters to their roles. A module whose configuration
    sets initial values has them in `constants`, by local name. Raises `TypeError` for a parameter without a role, which
    could not be initialised, decayed or scaled.
    """
    found: dict[str, ParameterInfo] = {}
    for prefix, module in model.named_modules():
        roles: Mapping[str, Role] = getattr(module, "roles", {})
        constants: Mapping[str, float] = getattr(module, "constants", {})
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            if local not in roles:
                raise TypeError(f"{name} has no role: give {type(module).__name__} a `roles` entry for {local!r}")
            found[name] = ParameterInfo(name, roles[local], parameter.shape, constants.get(local))
    return found
