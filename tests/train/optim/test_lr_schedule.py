"""Factors of the schedules, and rejected settings."""

from __future__ import annotations

from itertools import pairwise

import pytest

from core.errors import ConfigError
from train.optim.lr_schedule import LRSchedule, LRScheduleConfig


def factors(config: LRScheduleConfig, steps: int) -> list[float]:
    return [config.factor(step, steps) for step in range(steps)]


def test_wsd_warms_up_stays_and_falls():
    found = factors(LRScheduleConfig(kind=LRSchedule.wsd, warmup_steps=4, decay=0.5, final=0.1), 20)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:11] == [1.0] * 7
    assert found[11] == pytest.approx(1.0 - 0.9 * 0.1)
    assert found[19] == pytest.approx(0.1 + 0.9 * 0.1)
    assert all(a >= b for a, b in pairwise(found[4:]))


def test_cosine_ends_near_its_final_value():
    found = factors(LRScheduleConfig(kind=LRSchedule.cosine, warmup_steps=10, final=0.1), 1000)
    assert found[9] == 1.0
    assert found[505] == pytest.approx(0.55, abs=0.01)
    assert found[-1] == pytest.approx(0.1, abs=1e-4)


def test_constant_and_no_warmup():
    assert factors(LRScheduleConfig(kind=LRSchedule.constant), 3) == [1.0, 1.0, 1.0]
    assert factors(LRScheduleConfig(decay=0.0), 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("values", [{"warmup_steps": -1}, {"decay": 1.5}, {"final": -0.1}])
def test_bad_values_are_rejected(values):
    with pytest.raises(ConfigError):
        LRScheduleConfig(**values)
