"""Fit a sweep: the best learning rate, its confidence interval, and its dependence on the sizes of the run.

Losses are averaged over seeds. A parabola in log2 of the learning rate passes through the lowest mean and its two
neighbours; the optimum is its vertex. A lowest mean at the edge of the grid is rejected. Confidence intervals are
bootstrapped over seeds, with the same resamples for every setting, so differences between settings are paired.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import ConfigError
from hparam.scale import Scale

MOST_RESAMPLES = 1000
SIZES = ("hidden_size", "num_layers", "batch", "tokens")
"""Sizes for which an exponent is fitted if they take three values or more."""

Losses = Mapping[float, Mapping[int, float]]
"""learning rate -> seed -> held-out loss; not finite if the run diverged."""


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Optimum:
    """log2 of the best learning rate and the loss there, each with its 95% interval over seeds."""

    log2_lr: Interval
    loss: Interval

    @property
    def lr(self) -> float:
        return float(2**self.log2_lr.value)


@dataclass(frozen=True)
class Curve:
    """Losses of one setting, [learning rates, seeds], rates ascending. `chosen`: indices of the seeds to average."""

    name: str
    log2_lrs: NDArray[np.float64]
    losses: NDArray[np.float64]
    scale: Scale | None = None

    @property
    def seeds(self) -> range:
        return range(self.losses.shape[1])

    def mean(self, chosen: Sequence[int]) -> NDArray[np.float64]:
        """Return the mean loss of the chosen seeds at each learning rate; inf if the run of one of them diverged."""
        mean = self.losses[:, list(chosen)].mean(1)
        return np.where(np.isnan(mean), np.inf, mean)

    def vertex(self, chosen: Sequence[int]) -> tuple[float, float]:
        """Return the optimum of the mean over the chosen seeds: log2 learning rate and loss. Raises `ConfigError` if
        the best point is at the edge of the grid or every run diverged.
        """
        mean = self.mean(chosen)
        best = int(mean.argmin())
        if not np.isfinite(mean[best]):
            raise ConfigError("sweep.lr", None, f"every run of {self.name} diverged: extend the grid downwards")
        if best in (0, len(mean) - 1):
            side = "downwards" if best == 0 else "upwards"
            reason = f"the best of {self.name} is at the edge of the grid, 2^{self.log2_lrs[best]:g}: extend it {side}"
            raise ConfigError("sweep.lr", None, reason)
        near = slice(best - 1, best + 2)
        if not np.isfinite(mean[near]).all():
            return float(self.log2_lrs[best]), float(mean[best])
        a, b, c = np.polyfit(self.log2_lrs[near] - self.log2_lrs[best], mean[near], 2)
        place = -b / (2 * a) if a > 0 else 0.0
        return float(self.log2_lrs[best] + place), float(c + b * place + a * place * place)

    def vertices(self, resamples: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Return [resamples, (log2 lr, loss)]: each resample's vertex, or its best point if that is at the edge."""
        found = []
        for chosen in resamples:
            try:
                found.append(self.vertex(chosen))
            except ConfigError:
                mean = self.mean(chosen)
                found.append((float(self.log2_lrs[mean.argmin()]), float(mean.min())))
        return np.array(found)

    def at(self, log2_lr: float, chosen: Sequence[int]) -> float:
        """Return the loss at a learning rate, on the parabola through the 3 nearest points; inf beyond the grid."""
        mean, rates = self.mean(chosen), self.log2_lrs
        if not rates[0] <= log2_lr <= rates[-1]:
            return math.inf
        middle = min(max(int(np.abs(rates - log2_lr).argmin()), 1), len(rates) - 2)
        near = slice(middle - 1, middle + 2)
        if not np.isfinite(mean[near]).all():
            return float(np.interp(log2_lr, rates, mean))
        return float(np.polyval(np.polyfit(rates[near] - rates[middle], mean[near], 2), log2_lr - rates[middle]))


def curve(name: str, losses: Losses, scale: Scale | None = None) -> Curve:
    """Make a curve. Raises `ConfigError` if there are fewer than three learning rates, or if one of them lacks a seed:
    seeds could not be paired.
    """
    rates = sorted(losses)
    seeds = sorted({seed for by in losses.values() for seed in by})
    for rate, seed in itertools.product(rates, seeds):
        if seed not in losses[rate]:
            raise ConfigError("sweep.seeds", None, f"{name} lacks seed {seed} at {rate:g}: let the sweep finish")
    if len(rates) < 3:
        raise ConfigError("sweep.lr", None, f"{name} has {len(rates)} learning rates; a minimum needs three")
    table = np.array([[losses[rate][seed] for seed in seeds] for rate in rates])
    return Curve(name, np.log2(np.array(rates)), table, scale)


def resamples(seeds: int) -> list[tuple[int, ...]]:
    """Return every way to draw `seeds` seeds with replacement, or `MOST_RESAMPLES` random ones if there are more."""
    if seeds**seeds <= MOST_RESAMPLES:
        return list(itertools.product(range(seeds), repeat=seeds))
    generator = np.random.default_rng(0)
    return [tuple(generator.integers(seeds, size=seeds)) for _ in range(MOST_RESAMPLES)]


def _interval(value: float, samples: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def optimum(one: Curve) -> Optimum:
    """Find the optimum of a curve. Raises `ConfigError` if the minimum is not bracketed."""
    lr, loss = one.vertex(one.seeds)
    found = one.vertices(resamples(len(one.seeds)))
    return Optimum(_interval(lr, found[:, 0]), _interval(loss, found[:, 1]))


def drift(first: Curve, last: Curve) -> Interval:
    """Return by how many octaves the best learning rate of `last` exceeds that of `first`, paired by seed."""
    drawn = resamples(len(first.seeds))
    value = last.vertex(last.seeds)[0] - first.vertex(first.seeds)[0]
    return _interval(value, last.vertices(drawn)[:, 0] - first.vertices(drawn)[:, 0])


def penalty(first: Curve, last: Curve) -> Interval:
    """Return the cost of a transfer in nats: the loss of `last` at the optimum of `first` minus at its own."""
    drawn, seeds = resamples(len(first.seeds)), first.seeds
    value = last.at(first.vertex(seeds)[0], seeds) - last.vertex(seeds)[1]
    pairs = zip(drawn, first.vertices(drawn)[:, 0], last.vertices(drawn)[:, 1], strict=True)
    return _interval(value, np.array([last.at(rate, chosen) - own for chosen, rate, own in pairs]))


def exponents(curves: Sequence[Curve]) -> dict[str, Interval]:
    """Fit the best learning rate as a product of powers of the sizes with three values or more: size -> power."""
    varying = [size for size in SIZES if len({getattr(one.scale, size) for one in curves}) >= 3]
    if not varying or len(curves) < len(varying) + 2:
        return {}
    x = _logs(curves, varying)
    if np.linalg.matrix_rank(x) < x.shape[1]:
        return {}  # the sizes vary only together, so their exponents cannot be separated
    whole = _solve(x, np.array([one.vertex(one.seeds)[0] for one in curves]))
    drawn = resamples(len(curves[0].seeds))
    columns = np.stack([one.vertices(drawn)[:, 0] for one in curves], 1)
    samples = np.stack([_solve(x, rates) for rates in columns])
    return {size: _interval(whole[i], samples[:, i]) for i, size in enumerate(varying, start=1)}


def _logs(curves: Sequence[Curve], sizes: Sequence[str]) -> NDArray[np.float64]:
    """Return the columns of a linear fit: 1 and log2 of each size, [curves, 1 + sizes]."""
    return np.array([[1.0, *(math.log2(getattr(one.scale, size)) for size in sizes)] for one in curves])


def _solve(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.lstsq(x, y, rcond=None)[0], np.float64)


def predicted_optimum(curves: Sequence[Curve]) -> dict[str, Any] | None:
    """Predict the optimum of the most expensive setting from the other settings, and return it with the measured one.
    Return None for fewer than three settings.

    The prediction is a fit over the sizes that vary among the others. With fewer than three others, no more others than
    varying sizes, or sizes that vary only together, it is the mean of their optima.
    """
    if len(curves) < 3:
        return None
    *others, held_out = sorted(curves, key=_cost)
    rates = np.array([one.vertex(held_out.seeds)[0] for one in others])
    varying = [size for size in SIZES if len({getattr(one.scale, size) for one in others}) >= 2]
    x = _logs(others, varying)
    if len(others) > max(2, len(varying)) and np.linalg.matrix_rank(x) == x.shape[1]:
        predicted = float((_logs([held_out], varying) @ _solve(x, rates))[0])
    else:
        predicted = float(rates.mean())
    swept = float(held_out.vertex(held_out.seeds)[0])
    return {"held_out": held_out.name, "predicted": predicted, "swept": swept, "octaves": swept - predicted}


def _cost(one: Curve) -> float:
    assert one.scale is not None
    return float(one.scale.tokens) * one.scale.num_layers * one.scale.hidden_size**2


def plain_optimum(one: Optimum) -> dict[str, Any]:
    return {"lr": one.lr, "log2_lr": asdict(one.log2_lr), "loss": asdict(one.loss)}
