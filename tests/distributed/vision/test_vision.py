"""A model with vision computes under every layout what it computes in one process.

Some sequences, micro-batches, ranks and steps have no image: see `train.certify.worker.PICTURES`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.layouts import LAYOUTS, deep
from core.exit_codes import RankFailure
from launch.rank_pool import Pool
from model.config import ModelConfig
from model.vision.config import VisionConfig
from parallel.deepspeed.config import ZeroConfig
from parallel.layout import EngineKind, ParallelConfig, Recompute
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Compute, PrecisionConfig
from tests.support.bugs import BuggyRanks, measure_with_bug
from train.certify.compare import Comparison, compare
from train.certify.plan import Trial, compare_layouts, shrink
from train.certify.worker import CertifyCase, run_cases
from train.optim.config import OptimizerConfig, OptimizerKind

SGD = OptimizerConfig(kind=OptimizerKind.sgd, lr=0.1, weight_decay=0.0)


def seeing(top_k: int = 1) -> ModelConfig:
    """Return the model of `deep` with a vision encoder."""
    return shrink(replace(deep(top_k), vision=VisionConfig(image_token_id=63)), ParallelConfig(pp=4))


CASE = CertifyCase(seeing(), PrecisionConfig(Compute.float64), SGD, steps=3)


@pytest.fixture(scope="module")
def alone(ranks) -> Any:
    return ranks(1, run_cases, ParallelConfig(), {"run": CASE})[0]["run"]


def differing(ranks, alone, count: int, config: ParallelConfig, bug: str | None = None) -> list[Comparison]:
    found = BuggyRanks(ranks, bug)(count, run_cases, config, {"run": CASE})
    return [one for one in compare("run", alone, [rank["run"] for rank in found], CASE) if not one.passed]


@pytest.mark.parametrize("name", ["fsdp2", "tp2 + cp2", "pp2 zbv"])
def test_three_steps_are_those_of_one_process(ranks, alone, name):
    assert differing(ranks, alone, *LAYOUTS[name]) == []


@pytest.mark.parametrize(
    "bug, name, first",
    [
        ("rows_placed_before_the_scatter", "tp2", "embedding.weight"),
        pytest.param("tiles_in_reverse_order", "fsdp2", "embedding.weight", marks=pytest.mark.slow),
        pytest.param("tiles_in_reverse_order", "pp2 zbv", "embedding.weight", marks=pytest.mark.slow),
        ("scaled_by_participation", "fsdp2", "vision.class_token"),
        pytest.param("tiles_on_two_ranks", "tp2", "vision.class_token", marks=pytest.mark.slow),
        pytest.param("tiles_on_two_ranks", "cp2 ring", "vision.class_token", marks=pytest.mark.slow),
        pytest.param("encoder_not_summed_over_tp", "tp2", "vision.class_token", marks=pytest.mark.slow),
    ],
)
def test_a_planted_bug_is_blamed(ranks, alone, bug, name, first):
    """Bugs that only change the encoder's gradients show in it first."""
    found = differing(ranks, alone, *LAYOUTS[name], bug)
    assert [one.first for one in found if one.name == "run: gradients"] == [first], found


@pytest.mark.parametrize(
    "bug, name",
    [
        ("encoder_skipped_without_images", "fsdp2"),
        pytest.param("shares_that_overlap", "cp2 gather", marks=pytest.mark.slow),
    ],
)
def test_a_planted_bug_stops_the_run(bug, name):
    """Use a separate pool, since ranks whose collectives differ are of no further use."""
    pool, (count, config) = Pool(), LAYOUTS[name]
    try:
        with pytest.raises(RankFailure):
            pool(count, measure_with_bug, bug, config, {"run": CASE}, timeout_s=20.0)
    finally:
        pool.close()


MORE = {
    "all axes": (8, ParallelConfig(tp=2, cp=2, pp=2)),
    "all axes, hsdp": (8, ParallelConfig(dp_replicate=2, cp=2, tp=2, ep=2, recompute=Recompute.full)),
    "cp4 + tp2": (8, ParallelConfig(cp=4, tp=2)),
    "etp2 + cp2": (4, ParallelConfig(cp=2, etp=2)),
    "pp2 + tp2 zero bubble": (4, ParallelConfig(pp=2, tp=2, schedule=PipelineSchedule.interleaved_zero_bubble)),
}
ZERO = {
    f"zero{stage} {name}": (count, replace(config, engine=EngineKind.deepspeed, zero=ZeroConfig(stage=stage)))
    for stage in (1, 2, 3)
    for name, (count, config) in {"dp2": (2, ParallelConfig()), "tp2": (4, ParallelConfig(tp=2))}.items()
}
"""Layouts besides those of the page."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *MORE, *ZERO])
def test_every_layout_passes_with_vision(ranks, name):
    """Compare resumed checkpoints, balancing terms and float32 too. Stage 3 has no routed experts."""
    count, config = (LAYOUTS | MORE | ZERO)[name]
    model = replace(seeing(), layer_list=[seeing().blocks[0]] * 4) if name in ZERO else seeing(2)
    (outcome,) = compare_layouts(model, [Trial((), config, count)], 3, ranks)
    assert outcome.passed, outcome.failures()
