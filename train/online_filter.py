"""Filter online: every few steps the model in training scores the next sequences, and those with low loss are dropped.

A window holds the sequences of the next `every` steps. It has 1 / `keep` times as many candidates: sequences that the
window before deferred, and the next ones in the phase's order. The candidates with the highest loss are taken, in the
phase's order. Candidates that miss the threshold by less than `hysteresis` are deferred to the next window, because a
loss near the threshold is noisy. A fraction `revive` of the window is drawn at random from the other candidates, so
that the model does not forget easy text.

The state is a list of sample ordinals and a cursor. Checkpoints keep it, so a resumed run takes the same sequences on
any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.sampling import key_of
from train.config import OnlineConfig


def candidates(config: OnlineConfig, steps: int, global_batch_size: int) -> int:
    """Return the largest number of samples that a phase can use of its order: the samples of its steps or, with online
    filtering, the candidates of its windows if none is deferred.
    """
    if not config.every:
        return steps * global_batch_size
    whole, rest = divmod(steps, config.every)
    per_window, last = (round(n * global_batch_size / config.keep) for n in (config.every, rest))
    return whole * per_window + last


@dataclass
class OnlineWindow:
    """The samples (`rows`) of the steps from `first_step` on, and the state from which the next window is chosen."""

    generation: int = 0
    first_step: int = 0
    cursor: int = 0
    """Number of samples, from the start of the phase's order, that have been candidates."""
    rows: list[int] = field(default_factory=list)
    deferred: list[int] = field(default_factory=list)
    threshold: float = float("nan")
    """The lowest loss among the samples that were taken because of their loss, not at random."""


@dataclass(frozen=True)
class OnlineFilter:
    """The filter of one phase. `score` returns the current model's loss of each sample, the same on every rank."""

    config: OnlineConfig
    global_batch_size: int
    key: int
    score: Callable[[Sequence[int]], NDArray[np.float64]]

    def next(self, last: OnlineWindow, step: int, steps: int) -> OnlineWindow:
        """Choose the window of `steps` steps that begins with `step`."""
        needed = steps * self.global_batch_size
        fresh = max(round(needed / self.config.keep) - len(last.deferred), 0)
        candidates = np.asarray(sorted([*last.deferred, *range(last.cursor, last.cursor + fresh)]), np.int64)
        losses = self.score(candidates.tolist())
        taken, threshold = self._choose(candidates, losses, needed, last.generation + 1)
        deferred = ~taken & (losses > threshold - self.config.hysteresis) & self._usable(losses)
        deferred &= candidates >= last.cursor  # at most once, or the same candidates would return forever
        return OnlineWindow(
            generation=last.generation + 1,
            first_step=step,
            cursor=last.cursor + fresh,
            rows=candidates[taken].tolist(),
            deferred=candidates[deferred].tolist(),
            threshold=threshold,
        )

    def _choose(
        self, candidates: NDArray[np.int64], losses: NDArray[np.float64], needed: int, generation: int
    ) -> tuple[NDArray[np.bool_], float]:
        """Return a mask of the `needed` candidates to take, and the threshold."""
        draws = np.asarray([key_of(self.key, generation, int(one)) for one in candidates], np.uint64)
        usable = self._usable(losses)
        by_height = np.lexsort((draws, -np.where(usable, losses, -np.inf)))
        revived = min(round(needed * self.config.revive), needed - 1)  # at least one is taken because of its loss
        taken = np.zeros(len(candidates), bool)
        taken[by_height[: needed - revived]] = True
        rest = np.flatnonzero(~taken)
        # usable candidates first: an unusable one is drawn only if no other is left
        taken[rest[np.lexsort((draws[rest], ~usable[rest]))[:revived]]] = True
        return taken, float(losses[by_height[needed - revived - 1]])

    def _usable(self, losses: NDArray[np.float64]) -> NDArray[np.bool_]:
        found = np.isfinite(losses)
        return found if self.config.max_loss is None else found & (losses <= self.config.max_loss)
