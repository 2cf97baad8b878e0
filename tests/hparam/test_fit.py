"""Fit curves with a known optimum, and reject curves without one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from core.errors import ConfigError
from hparam.fit import Curve, curve, drift, exponents, optimum, penalty, predicted_optimum, resamples
from hparam.scale import Scale
from tests.hparam.test_transfer import BASE

RATES = [float(x) for x in range(-10, -3)]


def bowl(best: float, floor: float = 2.0, seeds: int = 3, spread: float = 0.0, scale: Scale = BASE) -> Curve:
    """Return a parabola in log2 of the learning rate. Its optimum moves by `spread` from seed to seed."""
    losses = {
        2.0**x: {seed: floor + 0.01 * (x - best - spread * (seed - 1)) ** 2 for seed in range(seeds)} for x in RATES
    }
    return curve(f"{best}", losses, scale)


def test_a_vertex_between_grid_points_is_found():
    found = optimum(bowl(-6.7))
    assert found.log2_lr.value == pytest.approx(-6.7) and found.loss.value == pytest.approx(2.0)
    assert found.lr == pytest.approx(2**-6.7)
    assert found.log2_lr.low == pytest.approx(-6.7) == found.log2_lr.high, "equal seeds give an interval of width 0"
    doubtful = optimum(bowl(-6.7, spread=0.5)).log2_lr
    assert doubtful.low < -7.0 and doubtful.high > -6.4 and doubtful.value == pytest.approx(-6.7)


def test_drift_is_paired_by_seed():
    """Both optima move by half an octave from seed to seed, so their distance does not change."""
    moved = drift(bowl(-6.7, spread=0.5), bowl(-7.9, spread=0.5))
    assert moved.value == pytest.approx(-1.2) and moved.high - moved.low < 1e-6
    assert penalty(bowl(-6.3), bowl(-7.1)).value == pytest.approx(0.01 * 0.8**2), "by the fitted parabolas"


@pytest.mark.parametrize("best, side", [(-11.0, "downwards"), (-3.0, "upwards")])
def test_a_minimum_at_the_edge_is_rejected(best, side):
    with pytest.raises(ConfigError, match=f"sweep.lr: the best of .* is at the edge of the grid.*: extend it {side}"):
        optimum(bowl(best))


def test_diverged_runs_are_ignored():
    one = bowl(-6.2)
    losses = one.losses.copy()
    losses[-1] = math.inf
    assert optimum(replace(one, losses=losses)).log2_lr.value == pytest.approx(-6.2)
    losses[-2:] = math.inf
    assert optimum(replace(one, losses=losses)).log2_lr.value in RATES, "no parabola through a diverged run"
    with pytest.raises(ConfigError, match=r"every run of .* diverged"):
        optimum(replace(one, losses=np.full_like(losses, math.inf)))


def test_missing_runs_are_named():
    with pytest.raises(ConfigError, match=r"x lacks seed 1 at 0.02"):
        curve("x", {0.01: {0: 2.0, 1: 2.0}, 0.02: {0: 2.0}, 0.04: {0: 2.0, 1: 2.0}})
    with pytest.raises(ConfigError, match=r"has 2 learning rates; a minimum needs three"):
        curve("x", {0.01: {0: 2.0}, 0.02: {0: 2.0}})


def test_resamples_are_all_or_many():
    assert len(resamples(3)) == 27 and resamples(1) == [(0,)]
    assert len(resamples(5)) == 1000 and resamples(5) == resamples(5)


def test_exponents_of_batch_and_tokens():
    """The optima are exactly log2 lr = -7 + 0.5 log2(batch ratio) - 0.3 log2(tokens ratio)."""
    grid = []
    for b, t in itertools.product((1, 2, 4), repeat=2):
        scale = replace(BASE, batch=BASE.batch * b, tokens=BASE.tokens * t)
        grid.append(bowl(-7 + 0.5 * math.log2(b) - 0.3 * math.log2(t), scale=scale))
    found = exponents(grid)
    assert found["batch"].value == pytest.approx(0.5) and found["tokens"].value == pytest.approx(-0.3)
    assert exponents(grid[:2]) == {}, "two token counts are not enough"
    together = [bowl(-7, scale=replace(BASE, batch=BASE.batch * f, tokens=BASE.tokens * f)) for f in (1, 2, 4, 8)]
    assert exponents(together) == {}, "batch and tokens vary only together"
    prediction = predicted_optimum(grid)
    assert prediction is not None and prediction["octaves"] == pytest.approx(0.0, abs=1e-6)


def test_the_largest_is_predicted_from_the_others():
    widths = [bowl(best, scale=replace(BASE, hidden_size=w)) for best, w in ((-7.0, 64), (-7.1, 128), (-6.0, 256))]
    prediction = predicted_optimum(widths)
    assert prediction is not None and prediction["held_out"] == "-6.0"
    assert prediction["predicted"] == pytest.approx(-7.05) and prediction["octaves"] == pytest.approx(1.05)
    assert predicted_optimum(widths[:2]) is None
