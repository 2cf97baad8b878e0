"""Memory of our own code: training state to the byte, saved activations as they are counted, passes in flight."""

from collections import Counter
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest
import torch

from bench.budget import TOKENS, Float8Calls, LayerCase
from core.config import load
from launch.plan.search import footprint
from launch.plan.search.config import PlanPrecision
from launch.plan.search.finalists import Finalists
from launch.plan.search.footprint import NONE, StateCounts, groups, in_flight, of_stages, saved_activations, taken
from launch.plan.search.grid import RECOMPUTE, candidates
from launch.plan.search.outline import ModelOutline
from launch.plan.search.rules import SCHEDULES
from launch.plan.search.schedules import order
from launch.plan.search.search import PlannedRun
from launch.verbs.plan import PlanConfig
from model.config import ModelConfig, QKNorm, RouterConfig, Score, WeightsOn
from model.roles import Role, registry
from parallel.cost import static_bytes
from parallel.layout import GatherExperts, Layout, Recompute, ReduceEvery
from parallel.mesh import meshes_of_rank
from parallel.parallelize import on_meta
from parallel.pipeline import runtime
from parallel.sharding import shard_specs
from precision.config import Compute, PrecisionConfig
from tests.launch.plan.search.small import SMALL, planned, search

BF16 = PrecisionConfig(compute=Compute.bfloat16)
MODELS = {
    "small": SMALL,
    "gains": replace(SMALL, qk_norm=QKNorm.full, shared_expert_hidden_size=0),
    "tied": replace(SMALL, tie_embeddings=True, num_experts=4),
}


def sampled(job, count: int):
    """Return a search, and rows of its candidates with different layouts and pipelines."""
    found = search(job, precision=[PlanPrecision.bf16], recompute=[Recompute.none], micro_batch_size=[1])
    blocks = list(
        candidates(found.outline, found.gpu, found.layouts, found.search, Counter(), lambda c: np.bool_(c["pp"] > 0))
    )
    random = Random(0)
    rows = [taken(block, np.array([random.randrange(len(block["pp"]))])) for block in blocks for _ in range(9)]
    return found, random.sample(rows, count)


def reduced_last(model: ModelConfig, layout: Layout, rank: int) -> int:
    """Return the bytes of gradients' shards that exist only after the whole sums: those that FSDP2 reduces once."""
    if layout.world_size == 1:
        return 0
    meshes, here = meshes_of_rank(layout, rank), on_meta(model, BF16)
    runtime.split_stages(here, meshes)
    every = layout.pp > 1 or layout.reduce_every is ReduceEvery.step
    experts = every or layout.gather_experts is GatherExperts.step
    units = [one for one in shard_specs(registry(here), model, meshes).values() if one.info.role is not Role.router]
    return 4 * sum(one.local_block.numel for one in units if (experts if one.info.role.is_expert else every))


def state_errors(model: ModelConfig, count: int = 12, muon: bool = False) -> list[str]:
    """Return the differences between the search's training state and the framework's, for ranks of sampled layouts."""
    found, rows = sampled(replace(planned(model), muon=muon), count)
    wrong = []
    given = (found.outline, found.counts, found.gpu, found.times, found.calibration)
    finalists = Finalists(*given, torch.float32, muon)
    for row in rows:
        layout = finalists.plan(row).layout
        for first, _, parts in of_stages(found.outline, found.counts, row, found.calibration):
            rank = first * (layout.world_size // layout.pp)
            truth = static_bytes(model, BF16, layout, torch.float32, rank, muon)
            gradients = truth.gradients + truth.unreduced - reduced_last(model, layout, rank)
            known = (truth.parameters + truth.gathered, gradients, truth.optimizer)
            ours = tuple(int(parts[name][0]) for name in ("weights", "gradients", "optimizer"))
            if ours != known:
                wrong.append(f"{layout.axes} stage {first}: {ours} is not {known}")
    return wrong


@pytest.mark.parametrize("name", MODELS)
def test_training_state_is_exact(name):
    assert not state_errors(MODELS[name])


@pytest.mark.slow
def test_the_best_plans_of_a_2t_model_are_exact():
    config = load("plan", PlanConfig, [])
    job = PlannedRun(config.model, config.cluster, config.run_shape, torch.float32, False)
    for plan in search(job)(5).plans:
        for stage in plan.stages:
            rank = stage.first * (plan.layout.world_size // plan.layout.pp)
            truth = static_bytes(config.model, BF16, plan.layout, torch.float32, rank)
            assert stage.parts["weights"] == truth.parameters + truth.gathered
            assert stage.parts["optimizer"] == truth.optimizer
            later = reduced_last(config.model, plan.layout, rank)
            assert stage.parts["gradients"] == truth.gradients + truth.unreduced - later


def test_training_state_of_muon_is_exact():
    assert not state_errors(SMALL, 6, muon=True)


@pytest.mark.parametrize("component", ["dense", "experts", "dense_shards", "expert_shards", "stored", "optimizer"])
def test_a_forgotten_component_of_the_state_is_seen(component, monkeypatch):
    class Forgetful(StateCounts):
        def __init__(self, *given):
            super().__init__(*given)
            setattr(self, component, np.zeros_like(getattr(self, component)))

    monkeypatch.setattr("launch.plan.search.search.StateCounts", Forgetful)
    assert state_errors(SMALL, 6)


def test_a_tensor_too_many_is_seen(monkeypatch):
    columns = ModelOutline(SMALL, planned().run).columns
    assert not state_errors(SMALL, 4)
    norm = next(one for one in columns[0] if one.role is Role.block_norm)
    extra = [[*columns[0], replace(norm, count=1)], *columns[1:]]
    monkeypatch.setattr(ModelOutline, "columns", extra)
    assert state_errors(SMALL, 4)


def one_layer(**changes: object) -> ModelConfig:
    return replace(ModelConfig(), num_layers=1, nope_every=0, **changes)  # type: ignore[arg-type]


LAYERS = {
    "scout": one_layer(),
    "dense": one_layer(moe_every=0),
    "olmoe": one_layer(
        qk_norm=QKNorm.full,
        shared_expert_hidden_size=0,
        num_experts=64,
        expert_hidden_size=1024,
        router=RouterConfig(top_k=8, score=Score.softmax, weights_on=WeightsOn.output),
    ),
}


@cache
def counted_bytes(name: str, float8: bool) -> list[int]:
    cases = [LayerCase(LAYERS[name], mode, float8=Float8Calls() if float8 else None) for mode in RECOMPUTE]
    return [case(32)[1] for case in cases]


def saved_errors(name: str, float8: bool) -> list[float]:
    """Return by how much the search's saved bytes differ from the counted ones, relative, for each recomputation."""
    outline = ModelOutline(LAYERS[name], replace(planned().run, seq_len=TOKENS))
    found = []
    for at, counted in enumerate(counted_bytes(name, float8)):
        c = {name: np.array([1]) for name in ("tp", "cp", "ep", "etp", "micro_batch_size")}
        c |= {"recompute": np.array([at]), "fp8": np.array([float8])}
        found.append(float(saved_activations(outline, 0, c)[0]) / counted - 1)
    return found


@pytest.mark.parametrize(
    ("name", "float8"),
    [("scout", False)]
    + [pytest.param(name, False, marks=pytest.mark.slow) for name in ("dense", "olmoe")]
    + [pytest.param(name, True, marks=pytest.mark.slow) for name in ("scout", "dense")],
)
def test_saved_activations_are_those_counted(name, float8):
    assert max(map(abs, saved_errors(name, float8))) < 0.004


def test_a_forgotten_activation_is_seen(monkeypatch):
    monkeypatch.setattr(footprint, "NONE", NONE + 1)  # nothing is recomputed by `none`, and norms are kept by it alone
    assert max(map(abs, saved_errors("scout", False))) > 0.1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: one.value)
def test_passes_in_flight_are_those_of_the_schedule(schedule):
    for pp, per_rank, batches in ((2, 2, 4), (4, 2, 8), (4, 3, 24), (4, 2, 14)):
        per_rank = 1 if schedule.is_single else 2 if schedule.is_v else per_rank
        if not schedule.accepts(batches, pp, per_rank):
            continue
        c = {"pp": np.array([pp]), "per_rank": np.array([per_rank]), "micro_batches": np.array([batches])}
        c["schedule"] = np.array([SCHEDULES.index(schedule)])
        for rank, work in order(schedule, pp, per_rank, batches).items():
            held = most = 0
            for kind, *_ in (piece for group in work for piece in group):
                held += kind == "F"
                most = max(most, held)
                held -= kind in "BW"
            assert in_flight(c, rank)[0] == most, (pp, per_rank, batches, rank)


def test_groups_cover_every_candidate_once():
    c = {"pp": np.array([1, 4, 1, 4]), "per_rank": np.array([1, 2, 1, 1]), "schedule": np.array([1, 2, 1, 1])}
    found = {(pp, per_rank): places.tolist() for places, pp, per_rank, _ in groups(c)}
    assert found == {(1, 1): [0, 2], (4, 2): [1], (4, 1): [3]}
