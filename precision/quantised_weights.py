"""Weights in FP8, quantised along rows and columns when a weight has changed: once per optimizer step.

A parameter is known by its storage and version: an optimizer step, a loaded checkpoint and any other write in place
give it a new version. FSDP2 hides its writes from the version of a gathered weight, which has the compute dtype
already. A weight in the compute dtype is therefore quantised at each use, along what is used, unless its owner promises
with `keep_while_gathered` to call `forget` before the weight is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from precision.weight_copies import parameter_of, state_of

Owners = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Kept:
    state: list[tuple[int, int]]
    has_columns: bool
    quantised: Any


class QuantisedWeights:
    """The weights of one backend, kept as long as their parameters: two bytes per weight, and scales. `quantise`: takes
    a weight, and whether to quantise its columns beside its rows.
    """

    def __init__(self, dtype: torch.dtype, quantise: Callable[[Tensor, bool, bool], Any]) -> None:
        self.dtype, self.quantise = dtype, quantise
        self.gathered = False
        self._kept: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def keep_while_gathered(self) -> None:
        """Keep weights in the compute dtype too, until `forget` is called."""
        self.gathered = True

    def forget(self) -> None:
        self._kept.clear()

    def owners(self, weights: Sequence[Tensor]) -> Owners | None:
        """Return the parameters whose quantised form may be kept, or None. A weight may be a parameter in another
        shape.
        """
        owners = []
        for w in weights:
            owner = parameter_of(w)
            if owner is None or (w.dtype is self.dtype and not self.gathered):
                return None
            owners.append(owner)
        return tuple(owners)

    def rows(self, weights: Sequence[Tensor], owners: Owners | None, backward: bool) -> Any:
        """Return matrices [F, D] stacked along F, or the matrices [E, F, D] of experts, quantised along their rows.
        What is kept has columns too if a `backward` pass will follow.
        """
        if owners is None:
            return self.quantise(_stacked(weights), True, False)
        return self._of(weights, owners, backward)

    def columns(self, weights: Sequence[Tensor], owners: Owners | None) -> Any:
        """Return the same weights, quantised along their columns."""
        if owners is None:
            return self.quantise(_stacked(weights), False, True)
        return self._of(weights, owners, True)

    @torch.no_grad()
    def _of(self, weights: Sequence[Tensor], owners: Owners, columns: bool) -> Any:
        state = self._state(owners)
        known = self._kept.setdefault(owners[0], {})  # a weight may be stacked with others, or stand alone
        key = len(owners), weights[0].shape
        kept = known.get(key)
        if kept is None or kept.state != state or (columns and not kept.has_columns):
            known.pop(key, None)  # frees the old bytes before the new ones are allocated
            kept = known[key] = _Kept(state, columns, self.quantise(_stacked(weights), True, columns))
        return kept.quantised

    def _state(self, owners: Owners) -> list[tuple[int, int]]:
        return state_of(owners)


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
