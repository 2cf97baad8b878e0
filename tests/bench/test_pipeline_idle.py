"""Compare the simulated idle time of pipeline schedules with the closed form."""

from __future__ import annotations

import itertools

import pytest

from launch.plan.search.schedules import closed_form, order, play
from parallel.pipeline.stages import PipelineSchedule

UNIT = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}


def unit(kind: str, stage: int) -> float:
    return UNIT[kind]


def per_rank(schedule: PipelineSchedule) -> int:
    return 1 if schedule.is_single else 2


@pytest.mark.parametrize("schedule", list(PipelineSchedule))
@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("rounds", [2, 3, 8])
def test_simulated_idle_time_equals_the_closed_form(schedule, pp, rounds):
    stages, micro_batches = per_rank(schedule), rounds * pp
    played = play(schedule, pp, stages, micro_batches, unit)
    assert played.idle == pytest.approx(closed_form(schedule, pp, stages, micro_batches), abs=1e-12)
    assert all(busy == 3 * stages * micro_batches for busy in played.busy)


@pytest.mark.parametrize("schedule", list(PipelineSchedule))
def test_micro_batches_pass_each_stage_once_each_way(schedule):
    pp, stages, micro_batches = 3, per_rank(schedule), 6
    rows = order(schedule, pp, stages, micro_batches).values()
    pieces = [piece for row in rows for together in row for piece in together]
    everything = set(itertools.product(range(pp * stages), range(micro_batches)))
    for kinds in (("F",), ("B", "I"), ("B", "W")):
        found = [(stage, micro_batch) for kind, stage, micro_batch in pieces if kind in kinds]
        assert len(found) == len(set(found)) and set(found) == everything


def test_a_slow_stage_delays_all():
    def slow(kind: str, stage: int) -> float:
        return UNIT[kind] * (3 if stage == 1 else 1)

    even, uneven = (play(PipelineSchedule.one_f_one_b, 4, 1, 8, duration) for duration in (unit, slow))
    assert uneven.step >= 8 * 9 and uneven.idle > 1.5 * even.idle


def test_more_stages_per_rank_leave_shorter_gaps():
    idle = [play(PipelineSchedule.interleaved, 4, stages, 8, unit).idle for stages in (2, 4)]
    assert idle[1] < 0.6 * idle[0] < play(PipelineSchedule.one_f_one_b, 4, 1, 8, unit).idle
