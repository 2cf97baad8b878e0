"""Detect trouble: NaN at once, and spikes by a robust rule with patience.

The median and the median absolute deviation (MAD) do not follow outliers, and suspicious values do not enter the
window, so trouble cannot become usual. Patience is needed because most spikes heal by themselves: the gradient norm of
BLOOM's training rose from 0.24 to 960 and fell again within about 30 steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from train.recovery.config import RecoveryConfig
from train.recovery.signals import LOSS, NORM, ROUTER

NOT_FINITE = "not_finite"
NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its MAD."""
LEAST_SPREAD = 1e-3
"""Least spread, as a fraction of the median: values that do not change at all have a MAD of 0."""


@dataclass(frozen=True)
class Finding:
    """Trouble that a detector found, or a spike that healed. `first`: the first suspicious step, `step`: the last one,
    both counted from 1. `statistics`: the values that were compared.
    """

    detector: str
    first: int
    step: int
    healed: bool
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass
class SignalHistory:
    """The calm values of one signal, and the suspicious steps since the last of them."""

    values: deque[float]
    first: int = 0
    count: int = 0
    peak: float = 0.0
    statistics: dict[str, float] = field(default_factory=dict)


class Detector:
    """Watches the signals of consecutive steps. It depends on nothing but their values, which all ranks have in common,
    so all ranks find the same.
    """

    def __init__(self, config: RecoveryConfig) -> None:
        self.config = config
        self.ratios = {LOSS: config.loss_ratio, NORM: config.norm_ratio, **dict.fromkeys(ROUTER, config.router_ratio)}
        self.reset()

    def reset(self) -> None:
        """Forget all steps, at the start of a phase with other data or batch sizes."""
        self.histories = {name: SignalHistory(deque(maxlen=self.config.window)) for name in self.ratios}

    def observe(self, step: int, values: Mapping[str, float]) -> list[Finding]:
        """Take the signals of a step, counted from 1. Return what is found: alarms, then spikes that have healed."""
        wrong = [name for name in (LOSS, NORM) if not math.isfinite(values[name])]
        if wrong:
            found = {name: values[name] for name in wrong}
            return [Finding(NOT_FINITE, step, step, False, found)]
        findings = [one for name, value in values.items() if (one := self._spike(name, step, value)) is not None]
        return sorted(findings, key=lambda one: one.healed)

    def is_spike(self, values: Mapping[str, float]) -> bool:
        """Return whether a step with these signals would be suspicious now. Takes nothing into the history."""
        if not all(math.isfinite(values[name]) for name in (LOSS, NORM)):
            return True
        return any(self._excess(name, value) is not None for name, value in values.items())

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        return {name: {**asdict(one), "values": list(one.values)} for name, one in self.histories.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        for name, one in state.items():
            if name in self.histories:
                values = deque(one["values"], self.config.window)
                self.histories[name] = SignalHistory(**{**one, "values": values})

    def _excess(self, name: str, value: float) -> dict[str, float] | None:
        """Return the statistics of a suspicious value, or None for a calm one."""
        history = self.histories[name]
        if len(history.values) < self.config.history:
            return None
        middle = median(history.values)
        mad = median(abs(one - middle) for one in history.values)
        spread = max(NORMAL_MAD * mad, LEAST_SPREAD * abs(middle))
        limit = max(middle + self.config.deviations * spread, self.ratios[name] * middle)
        if value <= limit:
            return None
        deviations = (value - middle) / spread if spread else math.inf
        return {"value": value, "median": middle, "mad": mad, "limit": limit, "deviations": deviations}

    def _spike(self, name: str, step: int, value: float) -> Finding | None:
        history, excess = self.histories[name], self._excess(name, value)
        if excess is None:
            history.values.append(value)
            count, history.count = history.count, 0
            if not count:
                return None
            return Finding(name, history.first, step - 1, True, {**history.statistics, "suspicious_steps": count})
        if not history.count or value > history.peak:
            history.peak, history.statistics = value, excess
        if not history.count:
            history.first = step
        history.count += 1
        if history.count != self.config.patience:  # one alarm for one trouble
            return None
        statistics = {**history.statistics, "suspicious_steps": history.count, "window": len(history.values)}
        return Finding(name, history.first, step, False, statistics)
