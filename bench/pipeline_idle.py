"""How long a pipeline's step takes and how much of it ranks stand idle, from the schedule alone.

torch's schedules say in which order each rank does its work; here that order is played through with a duration for each
kind of work. Communication takes no time, and a rank waits only for what it needs.

What comes out equals the published closed forms (`closed_form`; tests hold the two against each other). With p ranks, v
stages on each, n micro-batches, and a stage's forward as long as each half of its backward they are:

- gpipe, one_f_one_b: (p - 1) / (n + p - 1) (Narayanan et al. 2021, section 2.2)
- interleaved: (p - 1) / (v n + p - 1) (the same, section 2.2.2)
- interleaved_zero_bubble: (p - 1) / (3 v n + p - 1): the gaps of a backward are filled (Qi et al. 2024, table 2)
- zbv: (p - 1) / (6 n + p - 1) from 2 p micro-batches on: what is left is the first micro-batch's way to the last rank
- dualpipev: 2 (p - 1) / (6 n + 2 (p - 1)): torch sends a forward's result only after the backward paired with it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parallel.pipeline.runtime import SCHEDULES
from parallel.pipeline.stages import PipelineSchedule

Piece = tuple[str, int, int]
"""Kind of work, stage, micro-batch."""
Duration = Callable[[str, int], float]
"""Seconds of one piece of work of a stage: its kind (F forward, I gradient of the input, W of the weights, B both)."""


@dataclass(frozen=True)
class SimulatedStep:
    """`step` from the first piece of work to the last; `busy`: of each rank, in the unit of the durations."""

    step: float
    busy: list[float]

    @property
    def idle(self) -> float:
        """The share of all ranks' time in which they stand still."""
        return 1 - sum(self.busy) / (len(self.busy) * self.step)


def play(schedule: PipelineSchedule, pp: int, per_rank: int, micro_batches: int, duration: Duration) -> SimulatedStep:
    """Play a schedule through. Raises `RuntimeError` where its ranks would wait for each other for ever."""
    waiting = order(schedule, pp, per_rank, micro_batches)
    last = pp * per_rank - 1
    done: dict[Piece, float] = {}
    clock, busy = [0.0] * pp, [0.0] * pp
    while any(waiting.values()):
        before = len(done)
        for rank, work in waiting.items():
            while work and None not in (ready := [_ready(piece, last, done) for piece in work[0]]):
                pieces = work.pop(0)
                for (kind, stage, _), since in zip(pieces, ready, strict=True):
                    took = duration(kind, stage)
                    clock[rank] = max(clock[rank], since or 0.0) + took
                    busy[rank] += took
                done |= dict.fromkeys(pieces, clock[rank])  # what belongs together is sent when all of it is done
        if len(done) == before:
            raise RuntimeError(f"{schedule.name} stands still: {[work[0] for work in waiting.values() if work]}")
    return SimulatedStep(max(clock), busy)


def closed_form(schedule: PipelineSchedule, pp: int, per_rank: int, micro_batches: int) -> float:
    """The share of idle time where all stages cost the same and F, I and W last equally long."""
    gaps = pp - 1
    if schedule.is_single:
        return gaps / (micro_batches + gaps)
    if schedule is PipelineSchedule.interleaved:
        return gaps / (per_rank * micro_batches + gaps)
    if schedule is PipelineSchedule.dualpipev:
        gaps *= 2
    return gaps / (3 * per_rank * micro_batches + gaps)


def order(schedule: PipelineSchedule, pp: int, per_rank: int, micro_batches: int) -> dict[int, list[list[Piece]]]:
    """What each rank does, in order, and which pieces of it belong together. Where a rank has one stage it is written
    out here (torch's own listing of 1F1B names the wrong micro-batches), else torch tells.
    """
    if schedule.is_single:
        warm_up = {rank: micro_batches if schedule is PipelineSchedule.gpipe else pp - rank for rank in range(pp)}
        rows = {rank: _one_stage(rank, micro_batches, min(micro_batches, first)) for rank, first in warm_up.items()}
        return {rank: [[piece] for piece in row] for rank, row in rows.items()}
    stages = [_TheoryOutline(stage, pp * per_rank, pp) for stage in range(per_rank)]
    made = SCHEDULES[schedule](stages, n_microbatches=micro_batches, scale_grads=False)
    return {rank: [_pieces(action) for action in row if action] for rank, row in made.pipeline_order.items()}


def _one_stage(stage: int, micro_batches: int, warm_up: int) -> list[Piece]:
    """Some forwards, then backwards and forwards in turn, then the backwards that are left."""
    found: list[Piece] = [("F", stage, micro_batch_size) for micro_batch_size in range(warm_up)]
    for micro_batch_size in range(micro_batches):
        found.append(("B", stage, micro_batch_size))
        if warm_up + micro_batch_size < micro_batches:
            found.append(("F", stage, warm_up + micro_batch_size))
    return found


@dataclass
class _TheoryOutline:
    """As much of a stage as torch asks for to plan."""

    stage_index: int
    num_stages: int
    group_size: int
    group_rank: int = 0
    submod: None = None


def _pieces(action: Any) -> list[Piece]:
    if action.sub_actions is not None:
        return [piece for part in action.sub_actions for piece in _pieces(part)]
    return [(action.computation_type.value, action.stage_index, action.microbatch_index)]


def _ready(piece: Piece, last: int, done: dict[Piece, float]) -> float | None:
    """When what a piece of work needs was there; None: not yet."""
    kind, stage, micro_batch_size = piece
    if kind == "F":
        return 0.0 if stage == 0 else done.get(("F", stage - 1, micro_batch_size))
    if kind == "W":
        return done.get(("I", stage, micro_batch_size))
    forward = done.get(("F", stage, micro_batch_size))
    if stage == last or forward is None:
        return forward
    after = [done[k, stage + 1, micro_batch_size] for k in ("B", "I") if (k, stage + 1, micro_batch_size) in done]
    return max(forward, *after) if after else None
