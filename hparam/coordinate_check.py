"""Coordinate check: verify that activations change equally over a few steps, whatever the model's size.

The check measures changes because initial activations hardly depend on the parametrization (Yang et al. 2022, arXiv
2203.03466, appendix D.1). A slope is fitted to log2 of a change's root mean square (geometric mean over seeds) as a
function of log2 of the size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hparam.axes import SizeAxis
from hparam.rules import Parametrization

LIMITS: Mapping[SizeAxis, Mapping[str, float]] = {
    SizeAxis.width: {"residual": 0.15, "embedding": 0.15, "attention": 0.2, "moe": 0.2, "logits": 0.2},
    SizeAxis.depth: {"residual": 0.2},
    SizeAxis.experts: {"residual": 0.2, "logits": 0.2},
}
"""The largest absolute slope allowed for the change of each quantity."""
CONTROLS: Mapping[SizeAxis, float] = {SizeAxis.width: 0.4, SizeAxis.depth: 0.3}
"""With standard rules, the slope of some quantity must be at least this: else the check cannot detect wrong rules."""

Measured = Mapping[str, Mapping[str, float]]
"""quantity -> root mean squares: `initial`, of its values before training, and `change`, of their change."""
Measure = Callable[[SizeAxis, int, int, Parametrization], Measured]
"""(axis, factor, seed, parametrization) -> measured quantities."""


@dataclass(frozen=True)
class AxisResult:
    """`values` and `initial`: parametrization -> quantity -> geometric mean over seeds at each factor."""

    axis: SizeAxis
    factors: list[int]
    values: dict[str, dict[str, list[float]]]
    initial: dict[str, dict[str, list[float]]]

    @cached_property
    def slopes(self) -> dict[str, dict[str, float]]:
        return {name: {q: slope(self.factors, found) for q, found in by.items()} for name, by in self.values.items()}

    def failures(self) -> list[str]:
        """Describe each slope beyond its limit, and report if standard rules, the control, have too small slopes."""
        found = []
        ours, control = self.slopes[Parametrization.metap.value], self.slopes[Parametrization.standard.value]
        limits = {name: limit for name, limit in LIMITS[self.axis].items() if name in ours}
        for name, limit in limits.items():
            if not abs(ours[name]) <= limit:
                found.append(f"{self.axis.value}: the change of {name} has slope {ours[name]:+.3f}, limit {limit}")
        least = CONTROLS.get(self.axis)
        if least is not None and not max(abs(control[name]) for name in limits) >= least:
            steepest = max((control[name] for name in limits), key=abs)
            reason = f"inconclusive, the largest slope of standard rules is {steepest:+.3f}"
            found.append(f"{self.axis.value}: {reason}; take a larger learning rate or a wider range of sizes")
        return found

    def plain(self) -> dict[str, Any]:
        return {
            "factors": self.factors,
            "slopes": self.slopes,
            "changes": self.values,
            "initial": self.initial,
            "limits": dict(LIMITS[self.axis]),
            "control_at_least": CONTROLS.get(self.axis),
            "failures": self.failures(),
        }


def slope(factors: Sequence[int], values: Sequence[float]) -> float:
    """Fit the slope of log2(values) against log2(factors) by least squares; NaN unless all are positive and finite."""
    x, y = np.log2(np.asarray(factors, float)), np.asarray(values, float)
    if not (np.isfinite(y).all() and (y > 0).all()):
        return float("nan")
    return float(np.polyfit(x, np.log2(y), 1)[0])


def check_axis(
    measure: Measure, axis: SizeAxis, factors: Sequence[int], seeds: int, progress: Callable[[str], None]
) -> AxisResult:
    means: dict[str, Any] = {key: {rules.value: {} for rules in Parametrization} for key in ("change", "initial")}
    for rules in Parametrization:
        for factor in factors:
            found = [measure(axis, factor, seed, rules) for seed in range(seeds)]
            for key, quantity in itertools.product(means, found[0]):
                mean = _geometric_mean([one[quantity][key] for one in found])
                means[key][rules.value].setdefault(quantity, []).append(mean)
            residual = means["change"][rules.value]["residual"][-1]
            progress(f"{axis.value} x{factor} {rules.value}: the residual stream changes by {residual:.4g}")
    return AxisResult(axis, list(factors), means["change"], means["initial"])


def _geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean; 0 if a value is 0, as for a head initialised to zero."""
    array = np.asarray(values, float)
    return float(np.exp(np.log(array).mean())) if (array > 0).all() else float(array.min())
