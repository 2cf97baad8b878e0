"""Pipelines: what is computed, and how often."""

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
from model.config import BalanceConfig, FeedForward, ModelConfig
from model.load_balance import Balancer
from model.moe import Experts
from parallel.comm.world import connect
from parallel.layout import ParallelConfig, Recompute
from parallel.mesh import make_meshes
from parallel.parallelize import build
from parallel.pipeline.deferred_wgrad import Deferred
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Compute, PrecisionConfig
from tests.support.bugs import replaced
from tests.support.tiny import EXACT, trainer
from train.certify.plan import Trial, compare_layouts
from train.certify.worker import BATCH_SIZE, SEED, SEQ_LEN, SyntheticLoader
from train.engine.base import optimizer_step
from train.engine.fsdp import TorchEngine
from train.optim.optimizer import OptimizerConfig, OptimizerKind

SGD = OptimizerConfig(kind=OptimizerKind.sgd, weight_decay=0.0)
TERMS = BalanceConfig(bias_rate=0.01, aux=0.01, z=0.001)
LAYERS = 4


def moe_layers(top_k: int = 1) -> ModelConfig:
    """Four MoE layers, one for each stage, with every balancing term."""
    model = replace(tiny(top_k), balance=TERMS)
    moe = next(layer for layer in model.blocks if layer.feed_forward is FeedForward.moe)
    return replace(model, num_layers=LAYERS, layer_list=[moe] * LAYERS)


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """How often attention and experts ran forward here, the rows that experts got, and all-to-alls."""
    times: Counter[str] = Counter()
    honest = {Attention: Attention.forward, Experts: Experts.forward}
    all_to_all = dist.all_to_all_single

    def attention(self: Any, *arguments: Any) -> Any:
        times["attention"] += 1
        return honest[Attention](self, *arguments)

    def experts(self: Any, x_CD: torch.Tensor, counts_E: torch.Tensor) -> Any:
        times["experts"] += 1
        times["rows"] += x_CD.shape[0]
        return honest[Experts](self, x_CD, counts_E)

    def counted(*arguments: Any, **options: Any) -> Any:
        times["all_to_all"] += 1
        return all_to_all(*arguments, **options)

    with replaced() as plant:
        plant(Attention, "forward", attention)
        plant(Experts, "forward", experts)
        plant(dist, "all_to_all_single", counted)
        yield times


def one_step(
    parallel: ParallelConfig, model: ModelConfig, compute: Compute = Compute.float64, micro_batch_size: int = 1
) -> tuple[Counter[str], float, float, int]:
    """What one step did on this rank, its loss and norm, and how many routed tokens all routers counted."""
    world = connect()
    meshes = make_meshes(parallel.resolve(world.size), world)
    share = BATCH_SIZE // meshes.dp.size
    batch = SyntheticLoader(model.vocab_size).batch(0, meshes.dp.rank * share, (meshes.dp.rank + 1) * share)
    with counting() as times:  # before the model is built: recomputation holds the forwards that it finds
        placed = build(model, PrecisionConfig(compute), meshes, world.device, SEED)
        engine = TorchEngine(placed, SGD)
        balancer = Balancer(placed.model, lambda counts: meshes.world.sum(counts, "balance"))
        result = optimizer_step(engine, balancer, batch, micro_batch_size, None, 1.0)
    return times, result.loss.item(), result.gradient_norm.item(), int(result.balance["counts"].sum())


@pytest.fixture(scope="module")
def alone(ranks) -> Any:
    """What one process does."""
    return ranks(1, one_step, ParallelConfig(), moe_layers())[0]


@pytest.mark.parametrize(
    "schedule, recompute",
    [
        ("one_f_one_b", Recompute.full),
        ("interleaved_zero_bubble", Recompute.none),
        ("interleaved_zero_bubble", Recompute.full),
        ("zbv", Recompute.selective),
        ("zbv", Recompute.full),
    ],
)
def test_a_schedule_runs_no_more_forwards_than_needed(ranks, alone, schedule, recompute):
    """pp2 x ep2 with all balancing terms: micro-batches times layers, twice where they are recomputed."""
    model, schedule = moe_layers(), PipelineSchedule[schedule]
    parallel = ParallelConfig(pp=2, ep=2, schedule=schedule, recompute=recompute)
    found = ranks(4, one_step, parallel, model)
    micro_batches, layers = BATCH_SIZE // 2, LAYERS // 2
    repeated = 1 if recompute is Recompute.none else 2
    again = recompute is Recompute.full
    exchanges = 5 + 3 * again  # counts; rows there and back, and their gradients; counts, there and back recomputed
    for times, loss, norm, counted in found:
        assert times["attention"] == times["experts"] == repeated * micro_batches * layers
        assert times["all_to_all"] == exchanges * micro_batches * layers
        assert loss == pytest.approx(alone[1], rel=1e-12) and norm == pytest.approx(alone[2], rel=1e-12)
        assert counted == alone[3] == BATCH_SIZE * SEQ_LEN * LAYERS, (
            "every token of every layer once, whatever is repeated"
        )
    assert sum(times["rows"] for times, *_ in found) == repeated * BATCH_SIZE * SEQ_LEN * LAYERS


def split_by_torch(parallel: ParallelConfig, model: ModelConfig) -> Any:
    with replaced() as plant:
        plant(PipelineSchedule, "splits_backward", property(lambda schedule: False))
        return one_step(parallel, model)


def test_the_count_notices_repeated_forwards(ranks):
    """torch's own split of the backward pass recomputes a layer for each part."""
    parallel = ParallelConfig(pp=2, ep=2, schedule=PipelineSchedule.zbv, recompute=Recompute.full)
    times, *_ = ranks(4, split_by_torch, parallel, moe_layers())[0]
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
    (outcome,) = compare_layouts(moe_layers(2), [Trial(("pp",), parallel, count)], 2, ranks)
    assert outcome.passed, outcome.failures()


def test_tied_tables_at_both_ends_learn_as_one(ranks):
    count, parallel = layout("pp3")
    model = replace(moe_layers(), tie_embeddings=True)
    (outcome,) = compare_layouts(model, [Trial(("pp",), parallel, count)], 2, ranks)
    assert outcome.passed, outcome.failures()


@pytest.mark.parametrize(
    "schedule, micro_batches",
    [("interleaved_zero_bubble", 2), ("interleaved_zero_bubble", 8), ("zbv", 4), ("dualpipev", 8)],
)
def test_bf16_gradients_are_summed_as_without_a_split(ranks, schedule, micro_batches):
    """Gathered copies are bf16, and so is each product. Their sum is not, however few or many there are."""
    usual, split = (
        ranks(
            2, one_step, ParallelConfig(pp=2, schedule=one), moe_layers(), Compute.bfloat16, BATCH_SIZE // micro_batches
        )[0]
        for one in (PipelineSchedule.interleaved, PipelineSchedule[schedule])
    )
    assert split[1] == pytest.approx(usual[1], rel=1e-6) and split[2] == pytest.approx(usual[2], rel=1e-6)


def deferred_work(parallel: ParallelConfig, model: ModelConfig) -> str:
    """What happens on this rank, in order: "d" a product is deferred, "w" one is done, "|" a piece of work begins."""
    happened: list[str] = []
    defer, take = Deferred.defer, Deferred.take

    def deferred(self: Any, work: Any) -> None:
        happened.append("d")
        defer(self, lambda: (happened.append("w"), work()))

    def taken(self: Any) -> Any:
        run = take(self)
        return lambda: (happened.append("|"), run())

    with replaced() as plant:
        plant(Deferred, "defer", deferred)
        plant(Deferred, "take", taken)
        one_step(parallel, model)
    return "".join(happened)


def test_every_product_is_deferred_and_done_later(ranks):
    """In each layer four projections of attention, two products of the experts, three of the shared expert; and the
    head. At the end of a V the rank without the head has the backward passes of three micro-batches before the first of
    their weights.
    """
    with_head, without = ranks(2, deferred_work, ParallelConfig(pp=2, schedule=PipelineSchedule.zbv), moe_layers())
    for happened, head in ((with_head, BATCH_SIZE), (without, 0)):
        assert happened.count("d") == happened.count("w") == 2 * BATCH_SIZE * 9 + head
    assert without.endswith(3 * 9 * "d" + 3 * ("|" + 9 * "w"))


def losses(root: Path, name: str, overrides: list[str]) -> list[float]:
    run = trainer(root, name, overrides)
    return [run.train_step(step).loss.item() for step in range(run.steps)]


def test_phases_may_change_what_travels(ranks, small_corpus, tmp_path):
    """Longer sequences, other micro-batches, the same stages."""
    small = ["training.steps=2", "training.global_batch_size=8", "training.micro_batch_size=1"]
    changes = ["seq_len: 96", "micro_batch_size: 2, global_batch_size: 4", "seq_len: 48, global_batch_size: 8"]
    phases = ", ".join(f"{{name: p{index}, steps: 1, {change}}}" for index, change in enumerate(changes))
    overrides = [*small_corpus, *EXACT, *small, f"phases=[{phases}]"]
    (alone,) = ranks(1, losses, tmp_path, "one", overrides)
    stages = ["parallel.pp=2", "parallel.schedule=interleaved"]
    for found in ranks(2, losses, tmp_path, "two", [*overrides, *stages]):
        assert len(found) == 5 and found == pytest.approx(alone, rel=1e-9)
