"""A model with vision computes under every layout what it computes in one process.

Some sequences, micro-batches, ranks and steps have no image: see `train.certify.worker.PICTURES`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.layouts import LAYOUTS, deep
from model.config import ModelConfig
from model.vision.config import VisionConfig
from parallel.deepspeed.config import ZeroConfig
from parallel.layout import EngineKind, ParallelConfig, Recompute
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Compute, PrecisionConfig
from tests.support.bugs import BuggyRanks
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
    """Compare resumed checkpoints, balancing terms and float32 too."""
    count, config = (LAYOUTS | MORE | ZERO)[name]
    (outcome,) = compare_layouts(seeing(2), [Trial((), config, count)], 3, ranks)
    assert outcome.passed, outcome.failures()
