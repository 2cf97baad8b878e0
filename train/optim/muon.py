"""Muon (Jordan 2024; Liu et al. 2025, "Muon is scalable"): momentum, made orthogonal, for hidden layers' matrices.

The update of a matrix is its momentum with all singular values brought near 1 by a Newton-Schulz iteration, whatever
they were. It is made of the whole matrix as the model means it: query, key, value and output, gate, up and down, each
expert's own; see `parallel.whole_matrices` for how the pieces come together. AdamW has the rest.

Shapes: N matrices, O rows (outputs), I columns (inputs), of which a rank has o and i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ConfigError, check_numbers
from parallel.sharding import local
from parallel.whole_matrices import MatrixRange, Round
from precision.config import Compute, PrecisionConfig
from precision.gemm import widened

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's: steepest at 0, so that five steps bring what is above 0.01 of the norm between 0.7 and 1.2."""


class MuonScale(Enum):
    """How large an update of a matrix with O rows and I columns is; without it all singular values are about 1."""

    match_adamw = "match_adamw"
    """0.2 * sqrt(max(O, I)): as large per element as AdamW's usually are (Liu et al. 2025), so that one learning rate
    serves both.
    """
    unit_rms_norm = "unit_rms_norm"
    """sqrt(O / I): the output changes as much per step at every width, so rates carry over to wider models."""
    shape_scaling = "shape_scaling"
    """sqrt(max(1, O / I)), Jordan's."""

    def factor(self, rows: int, columns: int) -> float:
        if self is MuonScale.match_adamw:
            return 0.2 * math.sqrt(max(rows, columns))
        ratio = rows / columns
        return math.sqrt(ratio if self is MuonScale.unit_rms_norm else max(1.0, ratio))


@dataclass(frozen=True)
class MuonConfig:
    """`lr` is the peak for Muon's matrices; null: the optimizer's, which AdamW's share always has. It suits
    scale=match_adamw; the other scales want one of their own, about 0.02. Weight decay is the optimizer's.
    """

    lr: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    """Newton-Schulz iterations."""
    scale: MuonScale = MuonScale.match_adamw
    eps: float = 1e-7
    """Added to a matrix's norm before it is divided by it."""
    products: Compute | None = None
    """The format of the iteration, and of matrices on their way to it and back; null: that of the model's products."""

    def __post_init__(self) -> None:
        check_numbers(self, positive=("lr", "eps"))
        if not 0 <= self.momentum < 1:
            raise ConfigError("momentum", self.momentum, "must lie in [0, 1)")
        if not 1 <= self.steps <= 20:
            raise ConfigError("steps", self.steps, "must be from 1 to 20", [5])

    def format(self, compute: torch.dtype) -> torch.dtype:
        """In which matrices are sent and worked on by a model whose products are in `compute`."""
        return compute if self.products is None else PrecisionConfig(self.products).compute_dtype


@torch.no_grad()
def orthogonalise(x_NOI: Tensor, steps: int, eps: float) -> Tensor:
    """U V^T of each matrix's singular value decomposition, roughly: singular values end between 0.7 and 1.2.

    Newton-Schulz of fifth order (Jordan 2024), in the format of `x_NOI`. A matrix of zeros stays one.
    """
    a, b, c = _COEFFICIENTS
    tall = x_NOI.shape[-2] > x_NOI.shape[-1]
    x = x_NOI.mT if tall else x_NOI
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the parameters of `groups`, `rest` (which keeps its own groups, and is stepped by this one) for others.

    Groups and state of both are found here. `parameters` are those of `groups` by name, `rounds` the plan that covers
    them. State: one `momentum` per parameter, laid out as the parameter is, in `moments` (None: as the parameter).
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        rest: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        rounds: Sequence[Round],
        config: MuonConfig,
        products: torch.dtype,
        moments: torch.dtype | None = None,
    ) -> None:
        super().__init__([*groups, *rest.param_groups], {})
        rest.state = self.state
        self.rest, self.parameters, self.rounds = rest, parameters, rounds
        self.config, self.products, self.moments = config, products, moments
        by_parameter = {parameter: group for group in groups for parameter in group["params"]}
        self.groups = {name: by_parameter[parameter] for name, parameter in parameters.items()}

    def prime(self) -> None:
        """Make the state that a first step would make; `rest` has its own way."""
        for parameter in self.parameters.values():
            if parameter not in self.state:
                self.state[parameter] = {"momentum": torch.zeros_like(parameter, dtype=self.moments)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Raises `ValueError` where a matrix has no gradient: its other pieces' ranks would wait for this one."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                raise ValueError(f"{name} has no gradient")
        self.rest.step()
        self.prime()
        for together in self.rounds:
            # the pieces are named by nobody, so that they are gone when the iteration needs the memory
            whole_NOI = together.gather(torch.cat([self._directions(piece) for piece in together.ranges]))
            whole_NOI = orthogonalise(whole_NOI, self.config.steps, self.config.eps)
            factor = self.config.scale.factor(*together.shape)
            for piece, update_Noi in zip(together.ranges, together.scatter(whole_NOI), strict=True):
                self._update(piece, update_Noi, factor)

    def _directions(self, piece: MatrixRange) -> Tensor:
        """Take the gradient into the momentum; what is to be made orthogonal is that, with Nesterov a step ahead."""
        parameter, kept = self.parameters[piece.name], self.config.momentum
        assert parameter.grad is not None
        gradient_Noi = widened(piece.of(local(parameter.grad)))
        stored_Noi = piece.of(local(self.state[parameter]["momentum"]))
        momentum_Noi = stored_Noi.to(gradient_Noi.dtype).lerp_(gradient_Noi, 1 - kept)
        stored_Noi.copy_(momentum_Noi)
        ahead_Noi = gradient_Noi.lerp(momentum_Noi, kept) if self.config.nesterov else momentum_Noi
        return ahead_Noi.to(self.products)

    def _update(self, piece: MatrixRange, update_Noi: Tensor, factor: float) -> None:
        group, weight_Noi = self.groups[piece.name], piece.of(local(self.parameters[piece.name]))
        kept = widened(weight_Noi) * (1 - group["lr"] * group["weight_decay"])
        weight_Noi.copy_(kept.sub_(update_Noi, alpha=group["lr"] * factor))
