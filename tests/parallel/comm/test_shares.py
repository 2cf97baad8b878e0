"""Batches that ranks divide: an error of one is an error of all."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import LeviathanError
from parallel.comm.shares import Shares


class Both:
    """A world of two ranks, of which the other has no error."""

    size = 2

    def __init__(self) -> None:
        self.gathered: list[Any] = []

    def gather(self, value: Any, purpose: str) -> list[Any]:
        self.gathered.append(value)
        return [value, ({1: "other"}, None)]


def failing(batch: int | None) -> str:
    if batch == 0:
        raise ValueError("a fault")
    return "mine"


def test_any_error_is_told_to_the_other_ranks():
    world = Both()
    shares = Shares(world, 2, 0)  # type: ignore[arg-type]
    with pytest.raises(LeviathanError, match="ValueError: a fault"):
        shares.map([0, 1], failing)
    assert len(world.gathered) == 1, "the other rank does not wait"
    assert shares.map([2, 1], failing) == ["mine", "other"], "control"


@pytest.mark.parametrize("shares", [Shares(), Shares(Both(), 2, 0, in_step=True)])  # type: ignore[arg-type]
def test_an_error_in_a_common_pass_is_raised_at_once(shares):
    """The other ranks are in the same forward pass, which cannot be left without them."""
    with pytest.raises(ValueError, match="a fault"):
        shares.map([0, 1], failing)
