"""Online filtering: every so many steps the model in training scores the rows that come next; easy ones are left out.

A window is what the next `every` steps consume. Its candidates are the next rows of the plain order, 1 / `keep` times
as many as are needed; the hardest are taken, in their order. Candidates that were left out by less than `hysteresis`
are put off to the next window instead: near the threshold a score's noise must not decide for good. A share `revive` of
the window is drawn by lot out of the rest, so that what is easy is not forgotten and its loss stays known.

The state is a list of sample ordinals and a cursor. It is in the checkpoint, so a resumed run takes the very same rows,
on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from data.sampling import key_of


@dataclass(frozen=True)
class OnlineConfig:
    """`every`: steps between two scorings; 0: off. `keep`: share of the candidates that is trained on. `hysteresis`: in
    nats per token. `max_loss`: rows above it are noise and left out; null: none is.
    """

    every: int = 0
    keep: float = 0.5
    hysteresis: float = 0.05
    revive: float = 0.05
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError("every", self.every, "must not be negative; 0 turns it off", [0, 100])
        if not 0 < self.keep < 1:
            raise ConfigError("keep", self.keep, "must lie between 0 and 1", [0.5])
        if not 0 <= self.revive < 1:
            raise ConfigError("revive", self.revive, "must lie in [0, 1)", [0.05])
        if not self.hysteresis >= 0:
            raise ConfigError("hysteresis", self.hysteresis, "must not be negative", [0.0, 0.05])


def candidates(config: OnlineConfig, steps: int, global_batch_size: int) -> int:
    """Samples of the plain order that a phase takes at most: all of it, or what its windows ask for without any that
    were put off.
    """
    if not config.every:
        return steps * global_batch_size
    whole, rest = divmod(steps, config.every)
    per_window, last = (round(n * global_batch_size / config.keep) for n in (config.every, rest))
    return whole * per_window + last


@dataclass
class OnlineWindow:
    """Which samples the steps from `first_step` on take, and how they were chosen."""

    generation: int = 0
    first_step: int = 0
    cursor: int = 0
    """Samples of the plain order that have been candidates."""
    rows: list[int] = field(default_factory=list)
    deferred: list[int] = field(default_factory=list)
    threshold: float = float("nan")
    """The lowest loss that was taken for its height."""

    def plain(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class OnlineFilter:
    """Of one phase. `score` gives the loss of each of these samples by the model as it is: the same on every rank."""

    config: OnlineConfig
    global_batch_size: int
    key: int
    score: Callable[[Sequence[int]], NDArray[np.float64]]

    def next(self, last: OnlineWindow, step: int, steps: int) -> OnlineWindow:
        """The window of `steps` steps that begins with `step`."""
        needed = steps * self.global_batch_size
        fresh = max(round(needed / self.config.keep) - len(last.deferred), 0)
        candidates = np.asarray(sorted([*last.deferred, *range(last.cursor, last.cursor + fresh)]), np.int64)
        losses = self.score(candidates.tolist())
        taken, threshold = self._choose(candidates, losses, needed, last.generation + 1)
        left_out = ~taken & (losses > threshold - self.config.hysteresis) & self._usable(losses)
        # what was put off once and failed again is out: or the same rows would come back for ever
        left_out &= candidates >= last.cursor
        return OnlineWindow(
            generation=last.generation + 1,
            first_step=step,
            cursor=last.cursor + fresh,
            rows=candidates[taken].tolist(),
            deferred=candidates[left_out].tolist(),
            threshold=threshold,
        )

    def _choose(
        self, candidates: NDArray[np.int64], losses: NDArray[np.float64], needed: int, generation: int
    ) -> tuple[NDArray[np.bool_], float]:
        """Exactly `needed` of the candidates, and the threshold."""
        lots = np.asarray([key_of(self.key, generation, int(one)) for one in candidates], np.uint64)
        usable = self._usable(losses)
        by_height = np.lexsort((lots, -np.where(usable, losses, -np.inf)))
        revived = min(round(needed * self.config.revive), needed - 1)  # one is taken for its height, at least
        taken = np.zeros(len(candidates), bool)
        taken[by_height[: needed - revived]] = True
        rest = np.flatnonzero(~taken)
        # by lot among what is usable first: noise comes in only where there is nothing else
        taken[rest[np.lexsort((lots[rest], ~usable[rest]))[:revived]]] = True
        return taken, float(losses[by_height[needed - revived - 1]])

    def _usable(self, losses: NDArray[np.float64]) -> NDArray[np.bool_]:
        found = np.isfinite(losses)
        return found if self.config.max_loss is None else found & (losses <= self.config.max_loss)
