"""Divide independent batches, such as questions to a model, among ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from core.errors import LeviathanError, one_line
from parallel.comm.world import World

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shares:
    """How the ranks of a world divide batches; without a world, this process takes all of them.

    `size`: the number of groups of ranks that take different batches. `rank`: the group of this rank. `in_step`:
    whether forward passes are collective, so that all ranks must run equally many.
    """

    world: World | None = None
    size: int = 1
    rank: int = 0
    in_step: bool = False

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank that this rank must keep in step with."""
        return self.world.any(flag) if self.world is not None and self.in_step else flag

    def agree(self, what: str, digest: Callable[[], str]) -> None:
        """Raise `ConfigError` on every rank if the ranks were given different batches."""
        if self.world is not None and self.world.size > 1:
            self.world.agree({what: digest()})

    def map(self, batches: Sequence[Batch], work: Callable[[Batch | None], Result]) -> list[Result]:
        """Return `work(batch)` for each batch, in order, on every rank. All ranks call this with the same batches.

        Batches are dealt in turn, so that neighbours, of similar lengths, run at the same time. If ranks keep in step,
        a rank without a batch calls `work(None)`, which runs as many forward passes as the others. A `LeviathanError`
        of any rank is raised on every rank; any other error too, as a `LeviathanError`, unless ranks keep in step.
        """
        found: dict[int, Result] = {}
        error: LeviathanError | None = None
        for turn in range(0, len(batches), self.size):
            place = turn + self.rank
            batch = batches[place] if place < len(batches) and error is None else None
            if batch is None and not self.in_step:
                break
            try:
                result = work(batch)
            except LeviathanError as caught:
                error = error or caught
                continue
            except Exception as caught:
                if self.in_step or self.size == 1:
                    raise  # the other ranks are in the same forward pass, or there are none
                error = LeviathanError(one_line(caught))
                continue
            if batch is not None:
                found[place] = result
        gathered = [(found, error)]
        if self.world is not None and self.size > 1:
            gathered = self.world.gather((found, error), "answers")
        for _, error in gathered:
            if error is not None:
                vars(error)["everywhere"] = error.everywhere or self.world is not None
                raise error
        whole = {place: result for part, _ in gathered for place, result in part.items()}
        return [whole[place] for place in range(len(batches))]
