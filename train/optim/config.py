"""The `optimizer` section of a run. Does not import torch, so that a configuration is checked at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from core.errors import ConfigError, check_numbers
from model.roles import Role
from precision.config import Compute, PrecisionConfig

if TYPE_CHECKING:
    import torch

SLOWEST_IN_BFLOAT16 = 0.99
"""Largest beta of a bf16 moment. bf16 has 8 significant bits: relative changes below 1/256 per step are lost."""


class MuonScale(Enum):
    """Factor on the orthogonalised update of a matrix with O rows and I columns."""

    match_adamw = "match_adamw"
    """0.2 * sqrt(max(O, I)): the RMS per element of a typical AdamW update (Liu et al. 2025), so that one learning rate
    suits both.
    """
    unit_rms_norm = "unit_rms_norm"
    """sqrt(O / I): a step changes the output equally at every width, so learning rates transfer to wider models."""
    shape_scaling = "shape_scaling"
    """sqrt(max(1, O / I)) (Jordan 2024)."""

    def factor(self, rows: int, columns: int) -> float:
        if self is MuonScale.match_adamw:
            return 0.2 * math.sqrt(max(rows, columns))
        ratio = rows / columns
        return math.sqrt(ratio if self is MuonScale.unit_rms_norm else max(1.0, ratio))


@dataclass(frozen=True)
class MuonConfig:
    """Settings of Muon's matrices. Weight decay is that of the optimizer."""

    lr: float | None = None
    """Peak learning rate; null: the optimizer's, which suits scale=match_adamw. The other scales need about 0.02."""
    momentum: float = 0.95
    """Decay per step of the running mean of gradients, in [0, 1)."""
    nesterov: bool = True
    """Orthogonalise the momentum as it would be after the same gradient again."""
    steps: int = 5
    """Newton-Schulz iterations."""
    scale: MuonScale = MuonScale.match_adamw
    eps: float = 1e-7
    """Added to the norm by which a matrix is divided."""
    products: Compute | None = None
    """Dtype of the iteration and of its communication; null: that of the model's matmuls."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("lr", "eps"))
        if not 0 <= self.momentum < 1:
            raise ConfigError("momentum", self.momentum, "must lie in [0, 1)")
        if not 1 <= self.steps <= 20:
            raise ConfigError("steps", self.steps, "must be from 1 to 20", [5])

    def format(self, compute: torch.dtype) -> torch.dtype:
        """Return the dtype of the iteration for a model whose matmuls are in `compute`."""
        return compute if self.products is None else PrecisionConfig(self.products).compute_dtype


class OptimizerKind(Enum):
    adamw = "adamw"
    """AdamW (Loshchilov & Hutter 2019), with weight decay in proportion to the learning rate."""
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
    """Halves their memory. Needs `beta2` of at most 0.99."""


@dataclass(frozen=True)
class GroupConfig:
    """Settings of one role."""

    lr_scale: float = 1.0
    """Factor on the learning rate; 0: the role is not trained."""
    weight_decay: float | None = None
    """Weight decay of the role; null: the optimizer's."""

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("lr_scale", "weight_decay"))


@dataclass(frozen=True)
class RoleConfig:
    """The hyperparameters of a role in this run."""

    lr: float
    """Peak learning rate."""
    eps: float
    """AdamW's epsilon."""
    weight_decay: float
    """Weight decay."""


@dataclass(frozen=True)
class Transferred:
    """Hyperparameters transferred from a base (`train.metap.hyperparameters`), which replace the optimizer's own."""

    beta2: float
    """Decay of AdamW's second moment, which may depend on the batch."""
    roles: dict[str, RoleConfig]
    """Hyperparameters by role."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its hyperparameters. Norms and biases have no weight decay."""

    kind: OptimizerKind = OptimizerKind.adamw
    """The update rule."""
    lr: float = 3e-3
    """Peak learning rate, which `schedule` scales."""
    beta1: float = 0.9
    """Decay per step of AdamW's first moment, in [0, 1)."""
    beta2: float = 0.95
    """Decay per step of AdamW's second moment, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Fraction of a weight that is subtracted per step, times the learning rate; 0: none."""
    moments: Moments = Moments.float32
    """Dtype of the optimizer's moments."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Used with kind=muon only."""
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Settings by role (`embedding`, `router`, `expert_down`, ...); the other roles have the settings above."""
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
        import torch

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
        if role.initial_constant is not None:
            return 0.0
        own = self.groups.get(role.name, GroupConfig()).weight_decay
        return self.weight_decay if own is None else own
