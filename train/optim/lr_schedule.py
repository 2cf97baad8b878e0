"""Learning-rate schedules as a factor on each group's peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from core.errors import ConfigError


class LRSchedule(Enum):
    constant = "constant"
    wsd = "wsd"
    cosine = "cosine"


@dataclass(frozen=True)
class LRScheduleConfig:
    """Linear warmup over `warmup_steps`, then `kind`.

    wsd: stays at the peak and falls linearly to `final` over the last `decay` share of the steps (Hu et al. 2024,
    arXiv 2404.06395, section 4). cosine: half a cosine from the peak to `final` (Loshchilov & Hutter 2017).
    """

    kind: LRSchedule = LRSchedule.wsd
    warmup_steps: int = 0
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError("warmup_steps", self.warmup_steps, "must not be negative", [0])
        for key in ("decay", "final"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(key, getattr(self, key), "must lie between 0 and 1")

    def factor(self, step: int, steps: int) -> float:
        """Factor for `step` (from 0) out of `steps`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.kind is LRSchedule.constant:
            return warm
        if self.kind is LRSchedule.cosine:
            progress = min(1.0, max(0, step - self.warmup_steps) / max(1, steps - self.warmup_steps))
            return warm * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)
        decaying = self.decay * steps
        left = min(1.0, (steps - step) / decaying) if decaying else 1.0
        return warm * (self.final + (1 - self.final) * left)
