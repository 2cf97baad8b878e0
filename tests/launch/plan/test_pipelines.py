"""Simulated pipelines take the time that closed forms give, and every pass runs once."""

import pytest

from launch.plan.pipeline import ChunkTime, estimate_pipeline, schedule, simulate_pipeline

SHAPES = [(2, 1, 8), (4, 1, 4), (8, 1, 64), (4, 2, 8), (8, 5, 16)]


def equal_stages(pp: int, chunks: int) -> list[list[ChunkTime]]:
    return [[ChunkTime(1.0, 2.0)] * chunks for _ in range(pp)]


@pytest.mark.parametrize(("pp", "chunks", "batches"), SHAPES)
def test_bubble_of_equal_stages_is_the_closed_form(pp, chunks, batches):
    found = simulate_pipeline(equal_stages(pp, chunks), batches)
    assert found.total == pytest.approx(3 * chunks * batches + 3 * (pp - 1))
    assert found.bubble == pytest.approx((pp - 1) / (chunks * batches))


@pytest.mark.parametrize(("pp", "chunks", "batches"), SHAPES)
def test_each_stage_runs_every_pass_once(pp, chunks, batches):
    for stage in range(pp):
        order = schedule(pp, chunks, stage, batches)
        assert len(set(order)) == len(order) == 2 * chunks * batches
        for chunk in range(chunks):
            for batch in range(batches):
                assert order.index((True, chunk, batch)) < order.index((False, chunk, batch))


def test_a_slow_last_stage_sets_the_pace():
    stages = equal_stages(4, 1)
    stages[-1] = [ChunkTime(2.0, 4.0)]
    assert simulate_pipeline(stages, 100).total == pytest.approx(6 * 100 + 3 * 3)


def test_a_long_run_repeats_its_middle():
    stages = [[ChunkTime(1 + at / 10, 2.0)] for at in range(5)]
    ends = [simulate_pipeline(stages, batches).total for batches in (12, 13, 400)]
    assert ends[2] == pytest.approx(ends[0] + 388 * (ends[1] - ends[0]))


@pytest.mark.parametrize(("pp", "chunks", "batches"), SHAPES)
def test_the_estimate_is_near_the_simulation(pp, chunks, batches):
    stages = equal_stages(pp, chunks)
    assert estimate_pipeline(stages, batches).total == pytest.approx(simulate_pipeline(stages, batches).total, rel=0.02)


def test_a_wrong_warm_up_is_noticed(monkeypatch):
    def eager(pp, chunks, stage, batches):
        return [(True, 0, at) for at in range(batches)] + [(False, 0, at) for at in range(batches)]

    monkeypatch.setattr(
        "launch.plan.pipeline.schedule", lambda pp, chunks, stage, batches: eager(pp, 1, stage, batches)[::-1]
    )
    monkeypatch.setattr("launch.plan.pipeline._order", lambda *shape: eager(*shape)[::-1])
    with pytest.raises(AssertionError, match="waits for itself"):
        simulate_pipeline(equal_stages(4, 1), 4)
