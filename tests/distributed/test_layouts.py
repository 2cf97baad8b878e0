"""The layouts that docs/certified.md lists: some of them here in a short test, all of them in the slow ones."""

from __future__ import annotations

import pytest

from bench.layouts import LAYOUTS, resumes, tiny
from parallel.layout import Dispatch, ParallelConfig, Recompute
from train.certify import EXACT, Outcome, Trial, compare_layouts


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
    from dataclasses import replace

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
