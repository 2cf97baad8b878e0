"""Simulate the step time and the idle fraction of a pipeline from its schedule alone.

torch's schedules give the order of work of each rank; `play` simulates that order with a duration for each kind of
work. Communication takes no time, and a rank waits only for its inputs.

The results equal the published closed forms, which `closed_form` computes; tests compare both. With p ranks, v stages
per rank, n micro-batches, and a stage's forward as long as each half of its backward, the idle fraction is:

- gpipe, one_f_one_b: (p - 1) / (n + p - 1) (Narayanan et al. 2021, section 2.2)
- interleaved: (p - 1) / (v n + p - 1) (Narayanan et al. 2021, section 2.2.2)
- interleaved_zero_bubble: (p - 1) / (3 v n + p - 1): weight gradients fill the gaps (Qi et al. 2024, table 2)
- zbv: (p - 1) / (6 n + p - 1) if n >= 2 p: ranks idle until the first micro-batch has reached the last rank
- dualpipev: 2 (p - 1) / (6 n + 2 (p - 1)): torch sends the output of a forward only after the backward paired with it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parallel.pipeline.runtime import SCHEDULES
from parallel.pipeline.stages import PipelineSchedule

Piece = tuple[str, int, int]
"""A piece of work: its kind, stage and micro-batch."""
Duration = Callable[[str, int], float]
"""(kind, stage) -> seconds. Kinds: F forward, I gradient of the input, W gradient of the weights, B both gradients."""


@dataclass(frozen=True)
class WorkSpan:
    """When a rank ran a piece of work, in seconds from the start of the step."""

    rank: int
    piece: Piece
    begin: float
    end: float


@dataclass(frozen=True)
class SimulatedStep:
    """`step`: seconds from the start of the first piece of work to the end of the last. `busy`: seconds of work of each
    rank.
    """

    step: float
    busy: list[float]
    spans: list[WorkSpan]

    @property
    def idle(self) -> float:
        """Fraction of all ranks' time without work."""
        return 1 - sum(self.busy) / (len(self.busy) * self.step)


def play(schedule: PipelineSchedule, pp: int, per_rank: int, micro_batches: int, duration: Duration) -> SimulatedStep:
    """Simulate a schedule. Raises `RuntimeError` on a deadlock."""
    waiting = order(schedule, pp, per_rank, micro_batches)
    last = pp * per_rank - 1
    done: dict[Piece, float] = {}
    clock, busy, spans = [0.0] * pp, [0.0] * pp, []
    while any(waiting.values()):
        before = len(done)
        for rank, work in waiting.items():
            while work and None not in (ready := [_ready(piece, last, done) for piece in work[0]]):
                pieces = work.pop(0)
                for piece, since in zip(pieces, ready, strict=True):
                    begin = max(clock[rank], since or 0.0)
                    clock[rank] = begin + duration(*piece[:2])
                    busy[rank] += clock[rank] - begin
                    spans.append(WorkSpan(rank, piece, begin, clock[rank]))
                done |= dict.fromkeys(pieces, clock[rank])  # results of a group are sent when all are complete
        if len(done) == before:
            raise RuntimeError(f"{schedule.name} deadlocks: {[work[0] for work in waiting.values() if work]}")
    return SimulatedStep(max(clock), busy, spans)


def closed_form(schedule: PipelineSchedule, pp: int, per_rank: int, micro_batches: int) -> float:
    """Return the idle fraction if all stages cost the same and F, I and W take equally long."""
    gaps = pp - 1
    if schedule.is_single:
        return gaps / (micro_batches + gaps)
    if schedule is PipelineSchedule.interleaved:
        return gaps / (per_rank * micro_batches + gaps)
    if schedule is PipelineSchedule.dualpipev:
        gaps *= 2
    return gaps / (3 * per_rank * micro_batches + gaps)


def order(schedule: PipelineSchedule, pp: int, per_rank: int, micro_batches: int) -> dict[int, list[list[Piece]]]:
    """Return the work of each rank in order, in groups that a rank runs together. With one stage per rank, the order is
    built here, because torch lists wrong micro-batches for 1F1B. Otherwise it is torch's.
    """
    if schedule.is_single:
        warm_up = {rank: micro_batches if schedule is PipelineSchedule.gpipe else pp - rank for rank in range(pp)}
        rows = {rank: _one_stage(rank, micro_batches, min(micro_batches, first)) for rank, first in warm_up.items()}
        return {rank: [[piece] for piece in row] for rank, row in rows.items()}
    stages = [_TheoryOutline(stage, pp * per_rank, pp) for stage in range(per_rank)]
    made = SCHEDULES[schedule](stages, n_microbatches=micro_batches, scale_grads=False)
    return {rank: [_pieces(action) for action in row if action] for rank, row in made.pipeline_order.items()}


def _one_stage(stage: int, micro_batches: int, warm_up: int) -> list[Piece]:
    """Return `warm_up` forwards, then backwards and forwards in turn, then the remaining backwards."""
    found: list[Piece] = [("F", stage, micro_batch) for micro_batch in range(warm_up)]
    for micro_batch in range(micro_batches):
        found.append(("B", stage, micro_batch))
        if warm_up + micro_batch < micro_batches:
            found.append(("F", stage, warm_up + micro_batch))
    return found


@dataclass
class _TheoryOutline:
    """The attributes of a stage that torch's planning uses."""

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
    """Return the time at which the inputs of a piece of work were complete, or None if they are not yet complete."""
    kind, stage, micro_batch = piece
    if kind == "F":
        return 0.0 if stage == 0 else done.get(("F", stage - 1, micro_batch))
    if kind == "W":
        return done.get(("I", stage, micro_batch))
    forward = done.get(("F", stage, micro_batch))
    if stage == last or forward is None:
        return forward
    after = [done[k, stage + 1, micro_batch] for k in ("B", "I") if (k, stage + 1, micro_batch) in done]
    return max(forward, *after) if after else None
