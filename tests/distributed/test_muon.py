"""Muon under every layout equals one process, and planted bugs in sharded matrices are noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.layout import ParallelConfig
from precision.config import Compute, PrecisionConfig
from tests.parallel.test_whole_matrices import awkward
from tests.support.bugs import BuggyRanks
from train.certify.compare import EXACT, compare, compare_blocks
from train.certify.worker import CertifyCase, RankResults, run_cases
from train.optim.config import Moments, MuonConfig, MuonScale, OptimizerConfig, OptimizerKind

MUON = OptimizerConfig(kind=OptimizerKind.muon, lr=1e-2)
LAYOUTS = {
    "fsdp2": (2, ParallelConfig()),
    "fsdp3": (3, ParallelConfig()),
    "pp2": (2, ParallelConfig(pp=2)),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp2-fsdp2": (4, ParallelConfig(tp=2)),
    "tp2-etp2": (2, ParallelConfig(tp=2, etp=2)),
    "ep2-etp2": (4, ParallelConfig(ep=2, etp=2)),
    "ep2-efsdp2": (4, ParallelConfig(ep=2)),
    "etp2-efsdp2": (4, ParallelConfig(etp=2)),
    "pp2-tp2": (4, ParallelConfig(pp=2, tp=2)),
    "hsdp": (4, ParallelConfig(dp_replicate=2)),
    "all": (8, ParallelConfig(dp_replicate=2, tp=2, ep=2, etp=2)),
}
"""tests/parallel/test_whole_matrices.py tests plans for more ranks."""
RUN = CertifyCase(awkward(), PrecisionConfig(Compute.float64), MUON, clip_norm=0.05, steps=3, batch_size=12)
SCALED = {scale.name: replace(RUN, optimizer=replace(MUON, muon=MuonConfig(scale=scale))) for scale in MuonScale}


def results(ranks: Any, name: str, cases: Mapping[str, CertifyCase], bug: str | None = None) -> dict[str, Any]:
    count, parallel = LAYOUTS[name]
    found = BuggyRanks(ranks, bug)(count, run_cases, parallel, cases)
    return {case: [rank[case] for rank in found] for case in cases}


def apart(wanted: RankResults, found: list[RankResults]) -> float:
    """Return the largest relative difference of a parameter after the last step."""
    return compare_blocks("weights", wanted.weights, [rank.weights for rank in found], EXACT).largest


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory) -> tuple[RankResults, Path]:
    """Return the results of one process, and the path of its checkpoint of step 2."""
    path = tmp_path_factory.mktemp("one")
    return ranks(1, run_cases, ParallelConfig(), {"run": replace(RUN, save=path)})[0]["run"], path


QUICK = ("fsdp3", "tp2-fsdp2", "etp2-efsdp2", "hsdp")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_a_layout_trains_as_one_process_does(ranks, alone, name):
    """Compare losses, gradients, norms and the weights after three steps, with shards of unequal size."""
    found = results(ranks, name, {"run": RUN})["run"]
    assert [comparison for comparison in compare("run", alone[0], found, RUN) if not comparison.passed] == []
    assert apart(alone[0], found) < 1e-12
    if name == "fsdp3":
        experts = [rank.weights.get("layers.1.ffn.experts.down.weight", []) for rank in found]
        assert [sum(block.shape[0] for block, _ in some) for some in experts] == [2, 2, 0]
    if name == "hsdp":
        for key, ((_, values),) in found[0].weights.items():
            assert torch.equal(values, found[2].weights[key][0][1]), "replicas stay equal bit for bit"


@pytest.mark.parametrize(
    "name", ["fsdp3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fsdp2", "tp2-fsdp2", "etp2-efsdp2", "hsdp"))]
)
def test_one_matrix_at_a_time_is_updated_alike(ranks, alone, name):
    """With one matrix per round, some ranks have nothing to update in some rounds."""
    assert apart(alone[0], results(ranks, name, {"run": RUN}, "one_matrix_at_a_time")["run"]) < 1e-12


def test_scales_are_of_the_whole_matrix(ranks):
    cases = {scale: replace(case, steps=1) for scale, case in SCALED.items()}
    (wanted,), found = ranks(1, run_cases, ParallelConfig(), cases), results(ranks, "tp2", cases)
    assert max(apart(wanted[scale], found[scale]) for scale in cases) < 1e-12


def test_experts_fewer_than_ranks_are_split_by_hidden_size(ranks):
    """FSDP2 then shards a dimension other than the first, and its gradients have a different memory layout."""
    case = replace(RUN, model=replace(awkward(), num_experts=2))
    (wanted,) = ranks(1, run_cases, ParallelConfig(), {"run": case})
    found = [rank["run"] for rank in ranks(4, run_cases, ParallelConfig(), {"run": case})]
    assert found[0].weights["layers.1.ffn.experts.gate_up.weight"][0][0].shape == (2, 2, 20, 40)
    assert apart(wanted["run"], found) < 1e-12


@pytest.mark.slow
def test_a_checkpoint_resumes_under_other_layouts(ranks, alone, tmp_path):
    """Save under one layout and resume under another: step 3 has the weights of an uninterrupted run."""
    wanted, one = alone
    paths = {"one": one} | {name: tmp_path / name for name in ("tp2-fsdp2", "etp2-efsdp2")}
    resumed = {other: replace(RUN, resume=path) for other, path in paths.items()}
    for name in ("tp2-fsdp2", "etp2-efsdp2"):
        results(ranks, name, {"run": replace(RUN, save=paths[name])})
    for name in ("tp2-fsdp2", "etp2-efsdp2"):
        for other, found in results(ranks, name, resumed).items():
            assert apart(wanted, found) < EXACT, (other, name)
    assert apart(wanted, [ranks(1, run_cases, ParallelConfig(), resumed)[0]["tp2-fsdp2"]]) < EXACT
    lost = results(ranks, "tp2", {"run": resumed["one"]}, "moments_lost_on_the_way")["run"]
    assert apart(wanted, lost) > 1e-4, "the control: momentum matters"


@pytest.mark.slow
def test_a_narrow_momentum_resumes_under_another_layout(ranks, alone, tmp_path):
    """A run resumed under another layout differs from one process only by the rounding of bfloat16."""
    narrow = replace(RUN, optimizer=replace(MUON, moments=Moments.bfloat16))
    wanted = ranks(1, run_cases, ParallelConfig(), {"run": narrow})[0]["run"]
    results(ranks, "tp2-fsdp2", {"run": replace(narrow, save=tmp_path / "x")})
    found = results(ranks, "etp2-efsdp2", {"run": replace(narrow, resume=tmp_path / "x")})["run"]
    assert apart(wanted, found) < 1e-4
    assert apart(alone[0], [wanted]) > 1e-4, "the control: narrow moments differ"


@pytest.mark.parametrize(
    "bug, name",
    [
        ("shards_made_orthogonal", "tp2-fsdp2"),
        ("experts_mixed", "fsdp2"),
        ("swapped_on_the_way_back", "fsdp2"),
        pytest.param("shards_made_orthogonal", "fsdp2", marks=pytest.mark.slow),
        pytest.param("shards_made_orthogonal", "etp2-efsdp2", marks=pytest.mark.slow),
        pytest.param("factor_of_the_shard", "tp2-fsdp2", marks=pytest.mark.slow),
        pytest.param("momentum_of_a_step", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_a_planted_bug_is_noticed(ranks, alone, bug, name):
    assert apart(alone[0], results(ranks, name, {"run": RUN}, bug)["run"]) > 1e-3
