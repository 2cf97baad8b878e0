"""Muon under every layout equals one process, and planted bugs in sharded matrices are noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.layouts import tiny
from model.config import ModelConfig
from model.init import initial_slice
from parallel import whole_matrices
from parallel.comm.world import connect
from parallel.layout import ParallelConfig
from parallel.mesh import make_meshes
from parallel.parallelize import build
from parallel.sharding import local, local_shards
from precision.config import Compute, PrecisionConfig
from tests.support.bugs import Plant, replaced
from train.certify import worker
from train.certify.compare import EXACT, compare, compare_blocks
from train.certify.worker import Blocks, CertifyCase, RankResults, copy_blocks, run_cases
from train.optim import muon, optimizer
from train.optim.muon import MuonConfig, MuonScale
from train.optim.optimizer import Moments, OptimizerConfig, OptimizerKind

MUON = OptimizerConfig(kind=OptimizerKind.muon, lr=1e-2)
FP64 = PrecisionConfig(Compute.float64)
AWKWARD = replace(
    tiny(2),
    hidden_size=40,
    dense_hidden_size=50,
    num_experts=4,
    expert_hidden_size=80,
    shared_expert_hidden_size=18,
    head_dim=6,
)
"""Shards of unequal size. On three ranks nothing of an expert divides, and one of them has none."""


def apart(wanted: Blocks, found: list[Blocks]) -> float:
    """The largest relative difference of a parameter."""
    return compare_blocks("weights", wanted, found, EXACT).largest


# ----- a whole training run


LAYOUTS = {
    "fsdp2": (2, ParallelConfig()),
    "pp2": (2, ParallelConfig(pp=2)),
    "tp2-fsdp2": (4, ParallelConfig(tp=2)),
    "tp2-etp2": (2, ParallelConfig(tp=2, etp=2)),
    "ep2-etp2": (4, ParallelConfig(ep=2, etp=2)),
    "ep2-efsdp2": (4, ParallelConfig(ep=2)),
    "etp2-efsdp2": (4, ParallelConfig(etp=2)),
    "pp2-tp2": (4, ParallelConfig(pp=2, tp=2)),
    "hsdp": (4, ParallelConfig(dp_replicate=2)),
    "all": (8, ParallelConfig(dp_replicate=2, tp=2, ep=2, etp=2)),
}


def run(**options: Any) -> CertifyCase:
    return CertifyCase(tiny(2), FP64, MUON, clip_norm=0.05, steps=3, **options)


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory) -> tuple[RankResults, Path]:
    """What one process computes, and its checkpoint of the second step."""
    path = tmp_path_factory.mktemp("one")
    return ranks(1, run_cases, ParallelConfig(), {"run": run(save=path)})[0]["run"], path


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "all" else n for n in LAYOUTS])
def test_a_layout_trains_as_one_process_does(ranks, alone, name):
    """Losses, gradients, norms and the weights after three steps."""
    count, config = LAYOUTS[name]
    found = [rank["run"] for rank in ranks(count, run_cases, config, {"run": run()})]
    differing = [comparison for comparison in compare("run", alone[0], found, run()) if not comparison.passed]
    assert differing == []
    assert apart(alone[0].weights, [figures.weights for figures in found]) < 1e-12


def test_experts_fewer_than_ranks_are_split_by_hidden_size(ranks):
    """FSDP2 then shards another dimension than the first, and lays its gradients out accordingly."""
    case = replace(run(), model=replace(tiny(2), num_experts=2))
    (wanted,) = ranks(1, run_cases, ParallelConfig(), {"run": case})
    found = [rank["run"] for rank in ranks(4, run_cases, ParallelConfig(), {"run": case})]
    assert found[0].weights["layers.1.ffn.experts.gate_up.weight"][0][0].shape == (2, 2, 8, 32)
    assert apart(wanted["run"].weights, [figures.weights for figures in found]) < 1e-12


def forgetting(parallel: ParallelConfig, cases: dict[str, CertifyCase]) -> dict[str, RankResults]:
    """`run_cases` with a checkpoint whose momentum is not read."""
    honest = worker.Checkpointer.restore

    def forget(self: Any, model: Any, optimizer: Any, specs: Any) -> Any:
        progress = honest(self, model, optimizer, specs)
        for state in optimizer.state.values():
            if "momentum" in state:
                state["momentum"].zero_()
        return progress

    with replaced() as plant:
        plant(worker.Checkpointer, "restore", forget)
        return run_cases(parallel, cases)


@pytest.mark.slow
def test_a_checkpoint_resumes_under_other_layouts(ranks, alone, tmp_path):
    """Written by one, read by another: the weights of the third step are those of an uninterrupted run."""
    wanted, one = alone
    names = ["tp2-fsdp2", "etp2-efsdp2"]
    for name in names:
        count, config = LAYOUTS[name]
        ranks(count, run_cases, config, {"run": run(save=tmp_path / name)})
    for name in names:
        count, config = LAYOUTS[name]
        cases = {other: run(resume=tmp_path / other if other != "one" else one) for other in (*names, "one")}
        found = ranks(count, run_cases, config, cases)
        for other in cases:
            assert apart(wanted.weights, [rank[other].weights for rank in found]) < EXACT, (other, name)
    alone_again = ranks(1, run_cases, ParallelConfig(), {"run": run(resume=tmp_path / names[0])})
    assert apart(wanted.weights, [alone_again[0]["run"].weights]) < EXACT
    lost = ranks(2, forgetting, ParallelConfig(tp=2), {"run": run(resume=one)})
    assert apart(wanted.weights, [rank["run"].weights for rank in lost]) > 1e-4, "the control: momentum matters"


def test_a_narrow_momentum_resumes_under_another_layout(ranks, tmp_path):
    """Runs under several layouts differ by no more than the rounding of bfloat16."""
    narrow = replace(run(), optimizer=replace(MUON, moments=Moments.bfloat16))
    (wanted,) = ranks(1, run_cases, ParallelConfig(), {"run": narrow})
    count, config = LAYOUTS["tp2-fsdp2"]
    ranks(count, run_cases, config, {"run": replace(narrow, save=tmp_path / "x")})
    count, config = LAYOUTS["etp2-efsdp2"]
    found = ranks(count, run_cases, config, {"run": replace(narrow, resume=tmp_path / "x")})
    assert apart(wanted["run"].weights, [rank["run"].weights for rank in found]) < 1e-4
    wide = ranks(1, run_cases, ParallelConfig(), {"run": run()})[0]["run"].weights
    assert apart(wide, [wanted["run"].weights]) > 1e-4, "the control: narrow moments differ"


# ----- updates alone, from made-up gradients, for shapes and numbers of ranks that do not divide batches


def updated(
    parallel: ParallelConfig, model: ModelConfig, config: OptimizerConfig, at_once: int, bug: str | None = None
) -> Blocks:
    """This rank's weights after three updates."""
    world = connect()
    meshes = make_meshes(parallel.resolve(world.size), world)
    placed = build(model, FP64, meshes, world.device, seed=1)
    network, specs = placed.model, placed.specs
    with replaced() as plant:
        plant(optimizer, "rounds", lambda *arguments: whole_matrices.rounds(*arguments, at_once))
        if bug is not None:
            BUGS[bug](plant)
        made = optimizer.make_optimizer(network, specs, config, meshes)
        for step in range(3):
            for name, parameter in network.named_parameters():
                spec, gradient = specs[name], torch.zeros_like(parameter)
                block = spec.local_block
                values = initial_slice(spec.info, model, 100 + step, block.offset, block.shape, world.device)
                local(gradient).copy_(values)
                parameter.grad = gradient
            made.step()
    return copy_blocks(local_shards(network, specs))


ALL_AT_ONCE = whole_matrices.AT_ONCE
UNEVEN = {
    "fsdp2": (2, ParallelConfig()),
    "fsdp3": (3, ParallelConfig()),
    "tp2-fsdp2": (4, ParallelConfig(tp=2)),
    "etp2-efsdp2": (4, ParallelConfig(etp=2)),
    "hsdp": (4, ParallelConfig(dp_replicate=2)),
}
"""Plans for more ranks: tests/parallel/test_whole_matrices.py."""


@pytest.fixture(scope="module")
def one(ranks) -> Callable[..., Blocks]:
    """What one process makes of the same, by scale mode."""
    made: dict[MuonScale, Blocks] = {}

    def get(scale: MuonScale) -> Blocks:
        if scale not in made:
            config = replace(MUON, muon=MuonConfig(scale=scale))
            (made[scale],) = ranks(1, updated, ParallelConfig(), AWKWARD, config, ALL_AT_ONCE)
        return made[scale]

    return get


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_shards_are_updated_as_in_one_process(ranks, one, name):
    """All together, and one matrix at a time: rounds in which some ranks have nothing to do."""
    count, config = UNEVEN[name]
    for at_once in (ALL_AT_ONCE, 1):
        found = ranks(count, updated, config, AWKWARD, MUON, at_once)
        assert apart(one(MuonScale.match_adamw), found) < 1e-12, at_once
    if name == "fsdp3":
        experts = [rank.get("layers.1.ffn.experts.down.weight", []) for rank in found]
        assert [sum(block.shape[0] for block, _ in some) for some in experts] == [2, 2, 0]
    if name == "hsdp":
        for name, ((_, values),) in found[0].items():
            assert torch.equal(values, found[2][name][0][1]), "replicas stay equal bit for bit"


@pytest.mark.parametrize("scale", [MuonScale.unit_rms_norm, MuonScale.shape_scaling])
def test_scales_are_of_the_whole_matrix(ranks, one, scale):
    config = replace(MUON, muon=MuonConfig(scale=scale))
    found = ranks(4, updated, ParallelConfig(tp=2), AWKWARD, config, ALL_AT_ONCE)
    assert apart(one(scale), found) < 1e-12


def each_shard_alone(plant: Plant) -> None:
    """Orthogonal shards do not make up an orthogonal matrix."""
    plant(optimizer, "rounds", lambda *args: [replace(one, stages=()) for one in whole_matrices.rounds(*args)])


def experts_mixed(plant: Plant) -> None:
    """A stack of matrices is taken for one tall matrix."""
    honest = muon.orthogonalise
    plant(muon, "orthogonalise", lambda x, *rest: honest(x.flatten(0, 1)[None], *rest).view_as(x))


def factor_of_the_shard(plant: Plant) -> None:
    """The factor is computed from the shape of a rank's part under tensor parallelism."""

    def shrunk(specs: Any, meshes: Any) -> Any:
        plan = whole_matrices.rounds(specs, meshes)
        return [replace(each, shape=specs[each.ranges[0].name].compute_block.shape[-2:]) for each in plan]

    plant(optimizer, "rounds", shrunk)


def swapped_on_the_way_back(plant: Plant) -> None:
    """Shards come back in another order."""
    honest = whole_matrices.Round.scatter
    plant(whole_matrices.Round, "scatter", lambda self, whole: honest(self, whole.flip(0)))


def momentum_of_a_step(plant: Plant) -> None:
    """State is not kept."""
    honest = muon.Muon.step

    def forget(self: Any, closure: Any = None) -> None:
        for name in self.parameters:
            self.state.pop(self.parameters[name], None)
        honest(self)

    plant(muon.Muon, "step", forget)


BUGS: dict[str, Callable[[Plant], None]] = {
    bug.__name__: bug
    for bug in (each_shard_alone, experts_mixed, factor_of_the_shard, swapped_on_the_way_back, momentum_of_a_step)
}
SHOWN_BY = {
    "each_shard_alone": ["fsdp2", "tp2-fsdp2", "etp2-efsdp2"],
    "experts_mixed": ["fsdp2"],
    "factor_of_the_shard": ["tp2-fsdp2"],
    "swapped_on_the_way_back": ["fsdp2"],
    "momentum_of_a_step": ["fsdp2"],
}


@pytest.mark.parametrize("bug, name", [(bug, name) for bug, names in SHOWN_BY.items() for name in names])
def test_a_planted_bug_is_noticed(ranks, one, bug, name):
    count, config = UNEVEN[name]
    found = ranks(count, updated, config, AWKWARD, MUON, ALL_AT_ONCE, bug)
    assert apart(one(MuonScale.match_adamw), found) > 1e-3
