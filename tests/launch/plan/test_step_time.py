"""Step times of published runs. A model without bubbles, links or host is noticed."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan.calibration import default_calibration
from launch.plan.pipeline import PipelineTime
from launch.plan.readers import open_table
from launch.plan.step_time import step_time
from launch.plan.traffic import layer_exchanges
from launch.plan.workload import Job

HERE = Path(__file__).parent
CALIBRATION = default_calibration()


def rows(table: str) -> list:
    return [row for row in open_table(HERE / f"{table}.csv").rows if row.step_s]


def deepest() -> Job:
    return max((row.job for row in rows("runs")), key=lambda job: (job.axes.pp > 1) / job.micro_batches * job.axes.pp)


def without_bubble(stages, batches, send=0.0):
    busy = batches * max(sum(chunk.total for chunk in stage) for stage in stages)
    return PipelineTime(busy, busy)


def test_sampled_rows_are_near():
    errors = [abs(step_time(row.job, CALIBRATION).total / row.step_s - 1) for row in rows("runs")]
    assert sorted(errors)[len(errors) // 2] < 0.15


def test_the_parts_add_up_to_the_step():
    for row in rows("runs"):
        found = step_time(row.job, CALIBRATION)
        assert found.total > 0
        assert all(part >= 0 for part in vars(found).values()), row.number


def test_a_model_without_bubble_is_too_fast():
    job = deepest()
    whole, flat = step_time(job, CALIBRATION), step_time(job, CALIBRATION, without_bubble)
    assert whole.bubble > 0.05 * whole.total
    assert flat.total == pytest.approx(whole.total - whole.bubble)


def test_full_recomputation_costs_a_forward_pass():
    job = replace(deepest(), recompute=frozenset())
    again = replace(job, recompute=frozenset({"full"}))
    plain, repeated = step_time(job, CALIBRATION), step_time(again, CALIBRATION)
    assert repeated.recomputed > 0.2 * (plain.products + plain.attention)
    assert plain.recomputed == 0


@pytest.mark.parametrize(
    "constant", ["product_tile", "host_moe_s", "moe_traffic", "network_latency_s", "nanotron_send_s"]
)
def test_more_overhead_is_never_faster(constant):
    worse = replace(CALIBRATION, **{constant: 3 * getattr(CALIBRATION, constant)})
    for row in rows("runs") + rows("sweep"):
        assert step_time(row.job, worse).total >= step_time(row.job, CALIBRATION).total * (1 - 1e-9)


def test_experts_outside_a_domain_use_the_network():
    job = next(row.job for row in rows("runs") if row.job.shapes.experts and row.job.gpu.domain == 72)
    inside = [one for one in layer_exchanges(job, True) if one.axis == "ep"]
    outside = [one for one in layer_exchanges(replace(job, gpu=replace(job.gpu, domain=4)), True) if one.axis == "ep"]
    assert sum(one.network_bytes for one in inside) == 0
    assert sum(one.network_bytes for one in outside) > 0
