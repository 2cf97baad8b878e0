"""Latent attention and experts in groups compute under layouts what one process does."""

from __future__ import annotations

import pytest

from core.config import load
from model.config import ModelConfig
from parallel.layout import ContextMethod, ParallelConfig, Recompute
from parallel.pipeline.stages import PipelineSchedule
from tests.support.bugs import BuggyRanks
from train.certify.config import CertifyConfig
from train.certify.plan import Trial, compare_layouts, shrink

LAYOUTS = {
    "tp": (2, ParallelConfig(tp=2)),
    "cp-ulysses": (2, ParallelConfig(cp=2, cp_method=ContextMethod.ulysses)),
    "tp-cp-ring": (4, ParallelConfig(tp=2, cp=2, cp_method=ContextMethod.ring)),
    "tp-ep-recomputed": (2, ParallelConfig(tp=2, ep=2, recompute=Recompute.full)),
    "pp-zbv-ep": (4, ParallelConfig(pp=2, ep=2, schedule=PipelineSchedule.zbv)),
    "fsdp-selective": (2, ParallelConfig(recompute=Recompute.selective)),
}


def small(config: ParallelConfig) -> ModelConfig:
    """Return a model of DeepSeek-V3's kinds of layers, in the sizes that the layout divides."""
    model = shrink(load("certify", CertifyConfig, ["model=deepseek_v3"]).model, config)
    assert model.latent is not None and model.latent.query_rank and model.router.groups == 4
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_one_process_does(ranks, name):
    count, config = LAYOUTS[name]
    (outcome,) = compare_layouts(small(config), [Trial((), config, count)], 2, ranks)
    assert outcome.passed, outcome.failures()


@pytest.mark.slow
def test_gradients_that_ranks_do_not_sum_are_noticed(ranks):
    """Each rank of tp has some heads, so its gradient of what all heads share, such as `latent_down`, is partial."""
    config = LAYOUTS["tp"][1]
    (outcome,) = compare_layouts(small(config), [Trial((), config, 2)], 2, BuggyRanks(ranks, "gains_not_reduced"))
    assert any("latent_down" in line for line in outcome.failures()), outcome.failures()
