"""Pipelines: what is computed, how often, and what a run under them leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.layouts import tiny
from model.attention.layer import Attention
from model.balancer import Balancer
from model.config import BalanceConfig, FeedForward, ModelConfig
from model.moe import Experts
from parallel.comm.world import connect
from parallel.layout import ParallelConfig, Recompute
from parallel.mesh import make_meshes
from parallel.parallelize import build
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Compute, PrecisionConfig
from tests.support.tiny import EXACT, trainer
from train.certify.plan import Trial, compare_layouts
from train.certify.worker import BATCH_SIZE, SEED, SEQ_LEN, SyntheticLoader
from train.engine.base import optimizer_step
from train.engine.fsdp import TorchEngine
from train.optim.optimizer import OptimizerConfig, OptimizerKind

SGD = OptimizerConfig(kind=OptimizerKind.sgd, weight_decay=0.0)
TERMS = BalanceConfig(bias_rate=0.01, aux=0.01, z=0.001)
LAYERS = 4


def mixtures(top_k: int = 1) -> ModelConfig:
    """Four mixtures of experts, one for each stage, with every balancing term."""
    model = replace(tiny(top_k), balance=TERMS)
    mixture = next(layer for layer in model.blocks if layer.feed_forward is FeedForward.moe)
    return replace(model, num_layers=LAYERS, layer_list=[mixture] * LAYERS)


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """How often attention and experts ran forward here, the rows that experts saw, and all-to-alls."""
    times: Counter[str] = Counter()
    honest = {Attention: Attention.forward, Experts: Experts.forward}
    exchange = dist.all_to_all_single

    def attention(self: Any, *arguments: Any) -> Any:
        times["attention"] += 1
        return honest[Attention](self, *arguments)

    def experts(self: Any, x_CD: torch.Tensor, counts_E: torch.Tensor) -> Any:
        times["experts"] += 1
        times["rows"] += x_CD.shape[0]
        return honest[Experts](self, x_CD, counts_E)

    def all_to_all(*arguments: Any, **options: Any) -> Any:
        times["all_to_all"] += 1
        return exchange(*arguments, **options)

    Attention.forward, Experts.forward = attention, experts  # type: ignore[method-assign]
    dist.all_to_all_single = all_to_all
    try:
        yield times
    finally:
        Attention.forward, Experts.forward = honest[Attention], honest[Experts]  # type: ignore[method-assign]
        dist.all_to_all_single = exchange


def one_step(
    parallel: ParallelConfig, model: ModelConfig, compute: Compute = Compute.float64, micro_batch_size: int = 1
) -> tuple[Counter[str], float, float, int]:
    """What one step did on this rank, its loss and norm, and how many routed tokens all routers counted."""
    world = connect()
    meshes = make_meshes(parallel.resolve(world.size), world)
    share = BATCH_SIZE // meshes.rows.size
    batch = SyntheticLoader(model.vocab_size).batch(0, meshes.rows.rank * share, (meshes.rows.rank + 1) * share)
    with counting() as times:  # before the model is built: recomputation keeps hold of the forwards that it finds
        placed = build(model, PrecisionConfig(compute), meshes, world.device, SEED)
        engine = TorchEngine(placed, SGD)
        balancer = Balancer(placed.model, lambda counts: meshes.world.sum(counts, "balance"))
        result = optimizer_step(engine, balancer, batch, micro_batch_size, None, 1.0)
    return times, result.loss.item(), result.gradient_norm.item(), int(result.balance["counts"].sum())


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize(
    "schedule", [PipelineSchedule.one_f_one_b, PipelineSchedule.interleaved_zero_bubble, PipelineSchedule.zbv]
)
def test_no_schedule_runs_more_forwards_than_recomputation_needs(ranks, schedule, recompute):
    """pp2 x ep2 with all balancing terms: micro-batches times layers, twice where they are repeated."""
    model = mixtures()
    alone = ranks(1, one_step, ParallelConfig(), model)[0]
    parallel = ParallelConfig(pp=2, ep=2, schedule=schedule, recompute=recompute)
    found = ranks(4, one_step, parallel, model)
    micro_batches, layers = BATCH_SIZE // 2, LAYERS // 2
    repeated = 1 if recompute is Recompute.none else 2
    again = recompute is Recompute.full
    exchanges = 5 + 3 * again  # counts once; rows there and back, and their gradients; there, back and counts repeated
    for times, loss, norm, counted in found:
        assert times["attention"] == times["experts"] == repeated * micro_batches * layers
        assert times["all_to_all"] == exchanges * micro_batches * layers
        assert loss == pytest.approx(alone[1], rel=1e-12) and norm == pytest.approx(alone[2], rel=1e-12)
        assert counted == alone[3] == BATCH_SIZE * SEQ_LEN * LAYERS, (
            "every token of every layer once, whatever is repeated"
        )
    assert sum(times["rows"] for times, *_ in found) == repeated * BATCH_SIZE * SEQ_LEN * LAYERS


def split_by_torch(parallel: ParallelConfig, model: ModelConfig) -> Any:
    honest = PipelineSchedule.splits_backward
    PipelineSchedule.splits_backward = property(lambda schedule: False)  # type: ignore[method-assign, assignment]
    try:
        return one_step(parallel, model)
    finally:
        PipelineSchedule.splits_backward = honest  # type: ignore[method-assign]


def test_the_count_notices_repeated_forwards(ranks):
    """torch's own way to split the backward pass repeats a recomputed layer for each part."""
    parallel = ParallelConfig(pp=2, ep=2, schedule=PipelineSchedule.zbv, recompute=Recompute.full)
    times, *_ = ranks(4, split_by_torch, parallel, mixtures())[0]
    assert times["attention"] > 2 * (BATCH_SIZE // 2) * (LAYERS // 2)


def layout(name: str) -> tuple[int, ParallelConfig]:
    """Ranks and degrees by a short name: "pp2-ep2", with the schedule after a colon."""
    degrees, _, schedule = name.partition(":")
    given: dict[str, Any] = {"dp_shard": 1, "schedule": PipelineSchedule[schedule or "one_f_one_b"]}
    for part in degrees.split("-"):
        key = part.rstrip("0123456789")
        given[{"fsdp": "dp_shard", "hsdp": "dp_replicate"}.get(key, key)] = int(part.removeprefix(key))
    spread = given["dp_shard"] * given.get("tp", 1) * given.get("cp", 1)
    given["dp_shard"] *= -(-given.get("ep", 1) // spread)
    config = ParallelConfig(**given)
    return config.pp * config.dp_replicate * int(config.dp_shard) * config.cp * config.tp, config


FAST = ["pp2:zbv", "pp2-ep2"]
SLOW = [
    "pp2-tp2:interleaved_zero_bubble",
    *(f"pp2:{schedule.name}" for schedule in PipelineSchedule if schedule is not PipelineSchedule.zbv),
    "pp4",
    "pp2-fsdp2",
    "pp2-hsdp2:dualpipev",
    "pp2-tp2-ep2-fsdp2",
    "pp2-tp2-ep2-fsdp2:zbv",
]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_pipeline_computes_what_one_process_computes(ranks, name):
    """Gradients, norm, balancing terms, updates, evaluation and resumed checkpoints, in both formats."""
    count, parallel = layout(name)
    (outcome,) = compare_layouts(mixtures(2), [Trial(("pp",), parallel, count)], 2, ranks)
    assert outcome.passed, outcome.failures()


def test_tied_tables_at_both_ends_learn_as_one(ranks):
    count, parallel = layout("pp3")
    model = replace(mixtures(), tie_embeddings=True)
    (outcome,) = compare_layouts(model, [Trial(("pp",), parallel, count)], 2, ranks)
    assert outcome.passed, outcome.failures()


@pytest.mark.parametrize(
    "schedule", [PipelineSchedule.interleaved_zero_bubble, PipelineSchedule.zbv, PipelineSchedule.dualpipev]
)
@pytest.mark.parametrize("micro_batches", [2, 8])
def test_in_bfloat16_gradients_are_summed_as_without_a_split(ranks, schedule, micro_batches):
    """Gathered copies are bf16, and so is each product; their sum is not, however few or many there are."""
    micro_batches = max(micro_batches, 4 if schedule.is_v else 2)
    model, rows = mixtures(), BATCH_SIZE // micro_batches
    usual, split = (
        ranks(2, one_step, ParallelConfig(pp=2, schedule=one), model, Compute.bfloat16, rows)[0]
        for one in (PipelineSchedule.interleaved, schedule)
    )
    assert split[1] == pytest.approx(usual[1], rel=1e-6) and split[2] == pytest.approx(usual[2], rel=1e-6)


def put_off(parallel: ParallelConfig, model: ModelConfig) -> str:
    """What happens on this rank, in order: "n" a product is noted down, "w" one is done, "|" a piece of work begins."""
    from parallel.pipeline import deferred_wgrad

    happened: list[str] = []
    note, take = deferred_wgrad.Deferred.note, deferred_wgrad.Deferred.take

    def noted(self: Any, work: Any) -> None:
        happened.append("n")
        note(self, lambda: (happened.append("w"), work()))

    def taken(self: Any) -> Any:
        run = take(self)
        return lambda: (happened.append("|"), run())

    deferred_wgrad.Deferred.note, deferred_wgrad.Deferred.take = noted, taken  # type: ignore[method-assign, assignment]
    try:
        one_step(parallel, model)
    finally:
        deferred_wgrad.Deferred.note, deferred_wgrad.Deferred.take = note, take  # type: ignore[method-assign]
    return "".join(happened)


def test_every_product_is_put_off_and_done_later(ranks):
    """In each layer four projections of attention, two products of the experts, three of the shared expert; the head
    beside. At the end of a V the rank without the head has the backward passes of three micro-batches before the first
    of their weights.
    """
    with_head, without = ranks(2, put_off, ParallelConfig(pp=2, schedule=PipelineSchedule.zbv), mixtures())
    for happened, head in ((with_head, BATCH_SIZE), (without, 0)):
        assert happened.count("n") == happened.count("w") == 2 * BATCH_SIZE * 9 + head
    assert without.endswith(3 * 9 * "n" + 3 * ("|" + 9 * "w"))


def losses(root: Path, name: str, overrides: list[str]) -> list[float]:
    run = trainer(root, name, overrides)
    return [run.train_step(step).loss.item() for step in range(run.steps)]


@pytest.mark.parametrize(
    "longer", ["context: 96", "context: 96, micro_batch_size: 2, global_batch_size: 4", "micro_batch_size: 2"]
)
def test_a_phase_may_change_what_travels(ranks, small_corpus, tmp_path, longer):
    """Other rows, other micro-batches, the same stages."""
    small = ["training.steps=2", "training.global_batch_size=8", "training.micro_batch_size=1"]
    overrides = [*small_corpus, *EXACT, *small, f"phases=[{{name: longer, steps: 2, {longer}}}]"]
    alone = ranks(1, losses, tmp_path, "one", overrides)[0]
    stages = ["parallel.pp=2", "parallel.schedule=interleaved"]
    for found in ranks(2, losses, tmp_path, "two", [*overrides, *stages]):
        assert found == pytest.approx(alone, rel=1e-9)
