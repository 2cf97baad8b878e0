"""Learning-rate schedules, each a factor on the peak learning rate of every parameter group."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from core.errors import ConfigError
from core.import_path import check_options, load


class LRSchedule(Enum):
    constant = "constant"
    wsd = "wsd"
    cosine = "cosine"


@dataclass(frozen=True)
class LRScheduleConfig:
    """Linear warmup over `warmup_steps`, then `kind`. `final` is a fraction of the peak.

    wsd: stays at the peak, then falls linearly to `final` over the last fraction `decay` of the steps (Hu et al. 2024,
    arXiv 2404.06395, section 4). cosine: half a cosine from the peak to `final` (Loshchilov & Hutter 2017).
    """

    kind: LRSchedule | str = LRSchedule.wsd
    """A name, or the import path of a function, `my.module:function`. The function is called with (step, steps,
    **options) and returns the factor for `step` (from 0) of `steps`. This is multiplied by the warmup factor.
    """
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from 0 to the peak; 0: none."""
    decay: float = 0.2
    """For wsd: fraction of the steps, at the end, over which the rate falls; 0: it stays at the peak."""
    final: float = 0.0
    """Rate at the last step as a fraction of the peak, for wsd and cosine."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of an imported function."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError("warmup_steps", self.warmup_steps, "must not be negative", [0])
        for key in ("decay", "final"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(key, getattr(self, key), "must lie between 0 and 1")
        check_options(self.kind, self.options)

    def function(self) -> Callable[[int, int], float]:
        """Import the function that `kind` names. Raises `ConfigError` if it does not take the arguments."""
        return load(str(self.kind), "kind", 0, 1, options=self.options)

    def factor(self, step: int, steps: int) -> float:
        """Return the factor for `step` (from 0) of `steps`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if isinstance(self.kind, str):
            found = float(self.function()(step, steps))
            if not (math.isfinite(found) and found >= 0):
                raise ConfigError("schedule.kind", self.kind, f"returned {found} for step {step}: must be at least 0")
            return warm * found
        match self.kind:
            case LRSchedule.constant:
                return warm
            case LRSchedule.cosine:
                progress = min(1.0, max(0, step - self.warmup_steps) / max(1, steps - self.warmup_steps))
                return warm * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)
            case LRSchedule.wsd:
                decaying = self.decay * steps
                left = min(1.0, (steps - step) / decaying) if decaying else 1.0
                return warm * (self.final + (1 - self.final) * left)
