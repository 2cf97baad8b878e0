"""The layouts that docs/certified.md lists: some of them here in a short test, all of them in the slow ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.layouts import LAYOUTS, resumes, tiny
from parallel.layout import Dispatch, ParallelConfig, Recompute
from precision.backend import Compute, PrecisionConfig
from train.certify import EXACT, Outcome, Trial, compare, compare_layouts
from train.figures import Case, measure_all
from train.optimizer import OptimizerConfig


def tried(ranks, count: int, config: ParallelConfig, top_k: int) -> Outcome:
    (outcome,) = compare_layouts(tiny(top_k), [Trial((), config, count)], 2, ranks)
    assert outcome.passed, outcome.failures()
    return outcome


@pytest.mark.parametrize(
    "count, config, top_k",
    [
        (4, ParallelConfig(dp_replicate=2, recompute=Recompute.selective), 1),
        (4, ParallelConfig(ep=2, etp=2, dispatch=Dispatch.all_gather), 2),
        (8, ParallelConfig(dp_replicate=2, tp=2, ep=2, etp=2, recompute=Recompute.full), 2),
    ],
    ids=["hsdp-selective", "ep-etp-gathered", "all-axes-recomputed"],
)
def test_a_layout_computes_what_one_process_does(ranks, count, config, top_k):
    tried(ranks, count, config, top_k)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", [Dispatch.all_to_all, Dispatch.all_gather])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_listed_layout(ranks, name, top_k, dispatch):
    count, config = LAYOUTS[name]
    for mode in Recompute:
        tried(ranks, count, replace(config, recompute=mode, dispatch=dispatch), top_k)


def test_a_checkpoint_resumes_under_other_layouts(ranks):
    found = list(resumes(ranks, ["fsdp2", "tp2 + ep2", "etp2", "ep2 + efsdp2"]))
    assert len(found) == 16
    assert max(difference for _, _, difference in found) < EXACT, found


@pytest.mark.slow
def test_a_checkpoint_resumes_under_every_listed_layout(ranks):
    found = list(resumes(ranks, list(LAYOUTS)))
    assert len(found) == len(LAYOUTS) ** 2
    assert max(difference for _, _, difference in found) < EXACT, found


@pytest.mark.slow
@pytest.mark.parametrize("count, config", [(1, ParallelConfig()), (2, ParallelConfig(tp=2))], ids=["one", "tp2"])
def test_compiled_layers_compute_the_same(ranks, count, config):
    case = Case(tiny(2), PrecisionConfig(Compute.float64), OptimizerConfig(lr=1e-2), steps=2)
    (eager,) = ranks(1, measure_all, ParallelConfig(), {"run": case})
    compiled = ranks(count, measure_all, replace(config, compile=True), {"run": case}, timeout_s=600)
    for comparison in compare("compiled", eager["run"], [rank["run"] for rank in compiled], case):
        assert comparison.passed, comparison
