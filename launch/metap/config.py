"""Configuration of the actions of `metap`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from core.errors import ConfigError, check_numbers
from hparam.axes import SizeAxis
from hparam.rules import Parametrization

AXES = ("width", "depth", "experts")


@dataclass(frozen=True)
class CheckConfig:
    """Train scaled copies of a model for a few steps and measure how far activations move."""

    width: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Factors by which this axis is scaled; an empty list skips it."""
    depth: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Factors on the number of layers; an empty list skips it."""
    experts: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Factors on the numbers of total and active experts; an empty list skips it."""
    steps: int = 5
    """Optimizer steps after which the change of activations is measured."""
    seeds: int = 3
    """Number of initialisations per size, over which the change is averaged."""
    small_start: bool = True
    """Start with a zero head and a small router, so that only learnt changes are measured. Otherwise products of
    initial values and learnt changes contribute too, and these shrink with the square root of the width.
    """

    def __post_init__(self) -> None:
        for axis in AXES:
            factors = getattr(self, axis)
            if factors and (len(factors) < 2 or factors != sorted(set(factors)) or factors[0] < 1):
                raise ConfigError(axis, None, "needs ascending factors, at least two, or none", ["[1,2,4]"])
        check_numbers(self, positive=("steps", "seeds"))
        if not any((self.width, self.depth, self.experts)):
            raise ConfigError("width", None, "no axis is left to check")


@dataclass(frozen=True)
class SweepConfig:
    """Train with the learning rates 2^`low` to 2^`high`, in steps of `step` octaves, each with `seeds` seeds. Other
    keys of the run may have several values too (optimizer.weight_decay=0.05,0.1).
    """

    low: float = -10.0
    """Log2 of the smallest peak learning rate: -10 is 2^-10."""
    high: float = -5.0
    """Log2 of the largest peak learning rate."""
    step: float = 1.0
    """Distance of neighbouring rates in octaves: 1 doubles the rate, 0.5 multiplies it by 1.41."""
    seeds: int = 2
    """Number of runs per rate, with `run.seed` from 0 up. Their spread gives the confidence interval."""
    axis: SizeAxis | None = None
    """Scale the run along this axis by each of `factors`, and transfer its hyperparameters by each of `rules`."""
    factors: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Factors on the size along `axis`. Without an axis they are not used."""
    rules: list[Parametrization] = field(default_factory=lambda: [Parametrization.metap])
    """Rules by which the scaled runs get their hyperparameters. Without an axis they are not used."""
    processes: int = 1
    """Concurrent runs on this machine, with launch=inline; they share the cores."""
    oversubscribe: bool = False
    """Allow more concurrent runs than this machine can run well."""
    trials: int | None = None
    """Number of rates per setting that Optuna (the extra `search`) proposes within the same bounds; null: the grid.
    Machines with the same folder `out` work on the same search.
    """

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError("low", self.low, f"must be below sweep.high={self.high:g}")
        if not self.step > 0:
            raise ConfigError("step", self.step, "must be positive", [1.0, 0.5])
        check_numbers(self, positive=("seeds", "processes"))
        if self.trials is not None and self.trials < 3:
            raise ConfigError("trials", self.trials, "a search needs at least three", [12])
        if not self.factors or not self.rules:
            raise ConfigError("factors" if not self.factors else "rules", None, "needs at least one")

    @property
    def log2_rates(self) -> list[float]:
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [self.low + index * self.step for index in range(count)]


@dataclass(frozen=True)
class FitConfig:
    """Fit finished runs; writes `fit.json`, plots, and `base.yaml` for transfers."""

    runs: list[str] = field(default_factory=list)
    """Directories of runs or of sweeps; empty: the sweep in `out`."""
