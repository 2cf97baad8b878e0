"""Compare the step time of pipelines whose stages sleep with the time that the schedule alone implies.

`python -m bench bubble` runs each schedule on four ranks with eight micro-batches. A stage sleeps equally long in its
forward, for the gradient of its input and for the gradient of its weights, so the number of cores does not matter.
Everything else (torch's schedule, sends and our stages) is as in a training run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.measure import Result
from launch.plan.search.schedules import closed_form, play
from launch.rank_pool import Pool
from model.attention.plan import ForwardContext
from model.config import ModelConfig
from model.transformer import Stack
from parallel.comm.world import connect
from parallel.layout import ParallelConfig
from parallel.mesh import make_meshes
from parallel.pipeline.runtime import Pipeline, StageStack
from parallel.pipeline.stages import PipelineSchedule
from precision.config import PrecisionConfig
from precision.resolve import resolve

RANKS, MICRO_BATCHES, NAP_S, STEPS = 4, 8, 0.06, 3
WIDTH, LENGTH = 8, 4
MOST = 1.03


class Sleeper(StageStack):
    """A stage without layers that sleeps in its forward and in each half of its backward."""

    def __init__(self, number: int, splits: bool) -> None:
        super().__init__(None, {}, None, None)
        self.number, self.splits = number, splits
        self.weight = nn.Parameter(torch.zeros(()))
        self.note: Any = None

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        self.contexts.popleft()
        hidden = x if self.number else torch.zeros(1, LENGTH, WIDTH)
        return _Nap.apply(hidden + self.weight, self)


class _Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Sleeper) -> Tensor:
        ctx.stage = stage
        time.sleep(NAP_S)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(NAP_S)
        if ctx.stage.splits:
            ctx.stage.note(lambda: time.sleep(NAP_S))
        else:
            time.sleep(NAP_S)
        return grads[0], None


@dataclass(frozen=True)
class _Outline:
    """The attributes of a model that a pipeline uses."""

    config: ModelConfig
    compute_dtype: torch.dtype


def steps(parallel: ParallelConfig) -> list[float]:
    """Return the seconds of each step, until the slowest rank ends."""
    world = connect()
    meshes = make_meshes(parallel.resolve(world.size), world)
    model: Any = _Outline(
        ModelConfig(vocab_size=WIDTH, hidden_size=WIDTH, num_layers=8), resolve(PrecisionConfig()).compute_dtype
    )
    here = parallel.resolve(world.size).stages(model.config).of(meshes.pp.rank)
    stacks: dict[int, Stack] = {stage: Sleeper(stage, parallel.schedule.splits_backward) for stage in here}
    pipeline = Pipeline(model, stacks, meshes, world.device)
    for stage, stack in stacks.items():
        if isinstance(stack, Sleeper) and parallel.schedule.splits_backward:
            stack.note = pipeline.deferred[stage].defer
    tokens = torch.zeros(MICRO_BATCHES, LENGTH, dtype=torch.int64)
    contexts: list[Any] = [None] * MICRO_BATCHES
    found = []
    for _ in range(STEPS + 1):  # the first step connects the ranks
        dist.barrier()
        begin = time.perf_counter()
        pipeline.forward_backward(tokens, contexts, lambda losses: losses.sum())
        took = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        found.append(took.item())
    return found[1:]


def run() -> Iterator[Result]:
    """Yield the step time and that of the simulated schedule. The note has the measured and the computed idle time."""
    pool = Pool()
    try:
        for schedule in PipelineSchedule:
            parallel = ParallelConfig(pp=RANKS, schedule=schedule)
            played = play(schedule, RANKS, parallel.per_rank, MICRO_BATCHES, _nap)
            step = min(pool(RANKS, steps, parallel)[0])
            idle = 1 - 3 * NAP_S * parallel.per_rank * MICRO_BATCHES / step
            formula = closed_form(schedule, RANKS, parallel.per_rank, MICRO_BATCHES)
            ratio = step / played.step
            note = f"pp={RANKS}, {MICRO_BATCHES} micro-batches: idle {idle:.3f}, by the formula {formula:.3f}"
            name = f"step of {schedule.name}, sleeping stages (s)"
            yield Result(name, step, played.step, ratio, f"<= {MOST}", ratio <= MOST, note)
    finally:
        pool.close()


def _nap(kind: str, stage: int) -> float:
    return 2 * NAP_S if kind == "B" else NAP_S
