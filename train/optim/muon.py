"""Muon (Jordan 2024; Liu et al. 2025, "Muon is scalable"): orthogonalised momentum for the matrices of hidden layers.

The update of a matrix is its momentum with all singular values brought near 1 by a Newton-Schulz iteration. The
iteration needs whole logical matrices: query, key, value, output, gate, up and down, separately for each expert.
`parallel.whole_matrices` gathers the shards. AdamW updates all other parameters.

Shapes: N matrices, O rows (outputs), I columns (inputs); a rank's shard of a matrix has o rows and i columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.sharding import local
from parallel.whole_matrices import MatrixRange, Round
from precision.gemm import widened
from train.optim.config import MuonConfig

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients, steep at 0: five iterations bring singular values above 0.01 of the norm to 0.7-1.2."""


@torch.no_grad()
def orthogonalise(x_NOI: Tensor, steps: int, eps: float) -> Tensor:
    """Return about U V^T for each matrix with the SVD U S V^T: its singular values become 0.7 to 1.2.

    Runs the Newton-Schulz iteration of fifth order (Jordan 2024) in the dtype of `x_NOI`. Zero matrices stay zero.
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
    """Updates the parameters of `groups` by Muon and steps `rest`, the optimizer of all other parameters.

    `param_groups` and `state` cover both. `parameters` are those of `groups` by name. By the plan `rounds`, ranks
    gather their matrices. State: one `momentum` per parameter, sharded like the parameter, in dtype `moments` (None:
    the parameter's).
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
        """Allocate the state of Muon's parameters; `rest` allocates its own."""
        for parameter in self.parameters.values():
            if parameter not in self.state:
                self.state[parameter] = {"momentum": torch.zeros_like(parameter, dtype=self.moments)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters. Raises `ValueError` if a matrix has no gradient, or other ranks would hang."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                raise ValueError(f"{name} has no gradient")
        self.rest.step()
        self.prime()
        for together in self.rounds:
            # hold no reference to the shards, so their memory is freed before Newton-Schulz
            whole_NOI = together.gather(torch.cat([self._directions(piece) for piece in together.ranges]))
            whole_NOI = orthogonalise(whole_NOI, self.config.steps, self.config.eps)
            factor = self.config.scale.factor(*together.shape)
            for piece, update_Noi in zip(together.ranges, together.scatter(whole_NOI), strict=True):
                self._update(piece, update_Noi, factor)

    def _directions(self, piece: MatrixRange) -> Tensor:
        """Update the momentum and return what to orthogonalise: the momentum or, with `nesterov`, its look-ahead."""
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
