"""Pipelines compute the results of one process, and nothing more often than needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch import Tensor

from bench.layouts import tiny
from model.attention.layer import Attention
from model.config import BalanceConfig, FeedForward, ModelConfig
from model.moe import Experts
from parallel.layout import ParallelConfig, Recompute
from parallel.pipeline.deferred_wgrad import Deferred
from parallel.pipeline.stages import PipelineSchedule
from precision.config import Compute, PrecisionConfig
from tests.support.bugs import planted, replaces
from tests.support.models import placed_here
from tests.support.tiny import EXACT, synthetic, trainer
from train.certify.worker import BATCH_SIZE, SEED, SEQ_LEN
from train.optim.config import OptimizerConfig, OptimizerKind

SGD = OptimizerConfig(kind=OptimizerKind.sgd, weight_decay=0.0)
LAYERS = 4


def moe_layers() -> ModelConfig:
    """Return a model of four MoE layers, one per stage, with every balancing term."""
    model = replace(tiny(1), balance=BalanceConfig(bias_rate=0.01, aux=0.01, z=0.001))
    moe = next(layer for layer in model.blocks if layer.feed_forward is FeedForward.moe)
    return replace(model, num_layers=LAYERS, layer_list=[moe] * LAYERS)


TIMES: Counter[str] = Counter()
"""Counts on this rank: forward passes of attention and experts, rows of experts, and all-to-alls (`Tensor`)."""


@replaces(Attention, "forward")
@replaces(Experts, "forward")
@replaces(dist, "all_to_all_single")
def counted(honest, first, *arguments, **options):
    """Count the calls. This is planted like a bug, but changes nothing."""
    for kind in (Attention, Experts, Tensor):  # not `type`, since FSDP2 makes subclasses of modules
        TIMES[kind.__name__] += isinstance(first, kind)
    TIMES["rows"] += len(arguments[0]) if isinstance(first, Experts) else 0
    return honest(first, *arguments, **options)


def one_step(
    parallel: ParallelConfig, model: ModelConfig, compute: Compute = Compute.float64, micro_batch_size: int = 1
) -> tuple[Counter[str], float, float, int]:
    """Run one step. Return this rank's counts, the loss, the norm, and the tokens that all routers counted."""
    TIMES.clear()
    with planted("counted"):  # before the model is built, since recomputation stores the forward methods
        placed = placed_here(model, parallel, PrecisionConfig(compute), SEED)
        result = synthetic(placed, SGD, micro_batch_size)[2]()
    return TIMES, result.loss.item(), result.gradient_norm.item(), int(result.balance["counts"].sum())


@pytest.fixture(scope="module")
def alone(ranks) -> Any:
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
    """Under pp2 x ep2, each micro-batch runs each layer forward once, or twice if whole layers are recomputed."""
    model, schedule = moe_layers(), PipelineSchedule[schedule]
    parallel = ParallelConfig(pp=2, ep=2, schedule=schedule, recompute=recompute)
    found = ranks(4, one_step, parallel, model)
    micro_batches, layers = BATCH_SIZE // 2, LAYERS // 2
    repeated = 2 if recompute is Recompute.full else 1
    again = recompute is Recompute.full
    exchanges = 5 + 2 * again  # counts 1, rows 2, their gradients 2; recomputed: counts 1, rows 1
    for times, loss, norm, counted in found:
        assert times["Attention"] == times["Experts"] == repeated * micro_batches * layers
        assert times["Tensor"] == exchanges * micro_batches * layers, "all-to-alls"
        assert (loss, norm) == pytest.approx(alone[1:3], rel=1e-12)
        assert counted == alone[3] == BATCH_SIZE * SEQ_LEN * LAYERS, "every token once, whatever is repeated"
    assert sum(times["rows"] for times, *_ in found) == repeated * BATCH_SIZE * SEQ_LEN * LAYERS


@replaces(PipelineSchedule, "splits_backward")
def split_by_torch(honest, schedule):
    return False


def one_step_with(bug: str, parallel: ParallelConfig, model: ModelConfig) -> Any:
    with planted(bug):
        return one_step(parallel, model)


def test_the_count_notices_repeated_forwards(ranks):
    """Control: torch's own split of the backward pass recomputes a layer once for each part."""
    parallel = ParallelConfig(pp=2, ep=2, schedule=PipelineSchedule.zbv, recompute=Recompute.full)
    times, *_ = ranks(4, one_step_with, "split_by_torch", parallel, moe_layers())[0]
    assert times["Attention"] > 2 * (BATCH_SIZE // 2) * (LAYERS // 2)


@pytest.mark.parametrize(
    "schedule, micro_batches",
    [("interleaved_zero_bubble", 2), ("interleaved_zero_bubble", 8), ("zbv", 4), ("dualpipev", 8)],
)
def test_bf16_gradients_are_summed_as_without_a_split(ranks, schedule, micro_batches):
    """Gathered weights and each weight-gradient matmul are bf16, but the sum over 2 to 8 micro-batches is not."""
    how = (moe_layers(), Compute.bfloat16, BATCH_SIZE // micro_batches)
    schedules = (PipelineSchedule.interleaved, PipelineSchedule[schedule])
    usual, split = (ranks(2, one_step, ParallelConfig(pp=2, schedule=one), *how)[0] for one in schedules)
    assert split[1:3] == pytest.approx(usual[1:3], rel=1e-6)


def deferred_work(parallel: ParallelConfig, model: ModelConfig) -> str:
    """Return this rank's events: "d", a matmul is deferred; "w", one is computed; "|", those of a micro-batch begin."""
    happened: list[str] = []
    defer, take = Deferred.defer, Deferred.take

    def deferred(self: Any, work: Any) -> None:
        happened.append("d")
        defer(self, lambda: (happened.append("w"), work()))

    def taken(self: Any) -> Any:
        run = take(self)
        return lambda: (happened.append("|"), run())

    with patch.multiple(Deferred, defer=deferred, take=taken):
        one_step(parallel, model)
    return "".join(happened)


def test_every_product_is_deferred_and_done_later(ranks):
    """A layer defers 9 matmuls: 4 of attention, 2 of the experts and 3 of the shared expert. The head defers one more.
    At the end of a V schedule, the rank without the head runs the backward passes of three micro-batches before the
    deferred matmuls.
    """
    with_head, without = ranks(2, deferred_work, ParallelConfig(pp=2, schedule=PipelineSchedule.zbv), moe_layers())
    for happened, head in ((with_head, BATCH_SIZE), (without, 0)):
        assert happened.count("d") == happened.count("w") == 2 * BATCH_SIZE * 9 + head
    assert without.endswith(3 * 9 * "d" + 3 * ("|" + 9 * "w"))


def losses(root: Path, name: str, overrides: list[str]) -> list[float]:
    run = trainer(root, name, overrides)
    return [run.train_step(step).loss.item() for step in range(run.steps)]


def test_phases_may_change_what_travels(ranks, small_corpus, tmp_path):
    """Phases change the sequence length and the micro-batches; the stages stay the same."""
    small = ["training.steps=2", "training.global_batch_size=8", "training.micro_batch_size=1"]
    changes = ["seq_len: 96", "micro_batch_size: 2, global_batch_size: 4", "seq_len: 48, global_batch_size: 8"]
    phases = ", ".join(f"{{name: p{index}, steps: 1, {change}}}" for index, change in enumerate(changes))
    overrides = [*small_corpus, *EXACT, *small, f"phases=[{phases}]"]
    (alone,) = ranks(1, losses, tmp_path, "one", overrides)
    stages = ["parallel.pp=2", "parallel.schedule=interleaved"]
    for found in ranks(2, losses, tmp_path, "two", [*overrides, *stages]):
        assert len(found) == 5 and found == pytest.approx(alone, rel=1e-9)
