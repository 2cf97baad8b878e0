"""An encoder on all stages of a pipeline computes what one process computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.layouts import LAYOUTS
from model.roles import roles_of
from parallel.deepspeed.config import ZeroConfig
from parallel.layout import EngineKind, ParallelConfig, Recompute
from parallel.pipeline.stages import PipelineSchedule
from parallel.vision.config import EncoderStages, VisionParallelConfig
from parallel.vision.exchange import PURPOSE
from precision.config import Compute, PrecisionConfig
from tests.distributed.test_cost import assert_formulas_hold
from tests.distributed.vision.test_vision import CASE, MORE, seeing
from tests.support.bugs import BuggyRanks
from tests.support.models import placed_here
from tests.support.tiny import synthetic
from train.certify.compare import compare
from train.certify.plan import Trial, compare_layouts
from train.certify.worker import run_cases
from train.optim.config import OptimizerConfig, OptimizerKind

ALL = VisionParallelConfig(EncoderStages.all)
ZERO1 = {"engine": EngineKind.deepspeed, "zero": ZeroConfig(stage=1)}
AHEAD = {name: pair for name, pair in (LAYOUTS | MORE).items() if pair[1].pp > 1} | {
    "pp2 + hsdp 2x2": (8, ParallelConfig(pp=2, dp_replicate=2)),
    "pp2 recomputed": (2, ParallelConfig(pp=2, recompute=Recompute.full, schedule=PipelineSchedule.zbv)),
    "pp2 zero1": (4, ParallelConfig(pp=2, **ZERO1)),
}


def over_all(name: str) -> tuple[int, ParallelConfig]:
    count, config = AHEAD[name]
    return count, replace(config, vision=ALL)


@pytest.fixture(scope="module")
def alone(ranks) -> Any:
    return ranks(1, run_cases, ParallelConfig(), {"run": CASE})[0]["run"]


def failed(ranks, alone, name: str, bug: str | None = None) -> dict[str, str | None]:
    count, config = over_all(name)
    found = BuggyRanks(ranks, bug)(count, run_cases, config, {"run": CASE})
    return {one.name: one.first for one in compare("run", alone, [r["run"] for r in found], CASE) if not one.passed}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in AHEAD if name != "pp2 zero1"])
def test_three_steps_are_those_of_one_process(ranks, alone, name):
    """Some micro-batches, a stage's share and a whole step have no tile."""
    assert failed(ranks, alone, name) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pp2 zbv", "pp2 + tp2", "pp2 + cp2", "pp2 zero1"])
def test_pipelines_pass_with_the_encoder_ahead(ranks, name):
    """Compare resumed checkpoints, balancing terms, held-out loss and float32 too."""
    count, config = over_all(name)
    (outcome,) = compare_layouts(seeing(2), [Trial((), config, count)], 3, ranks)
    assert outcome.passed, outcome.failures()


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [["vision"], ["decoder"], ["vision_up", "embedding"]])
@pytest.mark.parametrize("kind", [OptimizerKind.adamw, OptimizerKind.muon])
def test_frozen_roles_and_muon_with_the_encoder_ahead(ranks, kind, freeze):
    count, config = over_all("pp2 + tp2")
    optimizer, frozen = OptimizerConfig(kind=kind), roles_of(freeze)
    (outcome,) = compare_layouts(seeing(2), [Trial((), config, count)], 2, ranks, optimizer, frozen)
    assert outcome.passed, outcome.failures()


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug, what, first",
    [
        ("tiles_of_later_stages_lost", "loss", None),
        ("encoder_summed_over_stages_twice", "gradients", "vision.class_token"),
        ("encoder_not_summed_over_stages", "gradients", "vision.class_token"),
    ],
)
def test_a_planted_bug_is_blamed(ranks, alone, bug, what, first):
    found = failed(ranks, alone, "pp2 one_f_one_b", bug)
    assert f"run: {what}" in found and "run: gradient norm" in found
    assert first is None or found[f"run: {what}"] == first


@pytest.mark.slow
def test_a_second_phase_that_is_forgotten_is_noticed(ranks, alone):
    with pytest.raises(Exception, match=r"vision.* has no gradient"):
        failed(ranks, alone, "pp2 gpipe", "encoder_not_run_again")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pp2 zbv", "pp2 + tp2", "pp2 + cp2"])
def test_the_formulas_count_the_bytes_of_all_stages(ranks, name):
    count, config = over_all(name)
    sent = assert_formulas_hold(ranks, CASE.model, count, config, image_tokens=24)
    assert ("pipeline", PURPOSE) in sent


def encoded(parallel: ParallelConfig) -> list[int]:
    """Return the numbers of tiles that this rank encodes at a time in a step."""
    placed = placed_here(CASE.model, parallel, PrecisionConfig(Compute.float64))
    _, _, step = synthetic(placed, OptimizerConfig(kind=OptimizerKind.sgd), 1)
    sizes: list[int] = []
    if placed.model.vision is not None:
        placed.model.vision.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    step()
    return sizes


@pytest.mark.slow
def test_all_stages_encode_equal_shares_twice(ranks):
    """A step has 6 tiles in 8 micro-batches. On the first stage alone each micro-batch is encoded by itself."""
    assert ranks(2, encoded, over_all("pp2 gpipe")[1]) == [[1, 1, 1] * 2] * 2
    first, second = ranks(2, encoded, AHEAD["pp2 gpipe"][1])
    assert sum(first) == 6 and len(first) == 8 and second == []
