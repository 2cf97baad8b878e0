"""Simulate a pipeline's schedule event by event.

Stages differ in time (embedding, head, dense and MoE layers), which closed forms of the bubble ignore. Schedule:
1F1B, or interleaved 1F1B with several model chunks per stage (Narayanan et al. 2021, 2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Seconds = float


@dataclass(frozen=True)
class ChunkTime:
    """Seconds that a stage spends on one micro-batch in one of its model chunks."""

    forward: Seconds
    backward: Seconds

    @property
    def total(self) -> Seconds:
        return self.forward + self.backward


@dataclass(frozen=True)
class PipelineTime:
    """`total`: from the first forward to the end of the last backward pass. `busy`: work of the busiest stage."""

    total: Seconds
    busy: Seconds

    @property
    def bubble(self) -> float:
        """Idle share of the busiest stage, relative to its work."""
        return self.total / self.busy - 1


def simulate_pipeline(stages: Sequence[Sequence[ChunkTime]], batches: int, send: Seconds = 0.0) -> PipelineTime:
    """Return the time of `batches` micro-batches through stages of model chunks. `send`: seconds between two stages.

    The middle of a long run repeats itself, so at most some micro-batches are simulated and the rest is added at the
    pace of the busiest stage.
    """
    pace = max(sum(chunk.total for chunk in stage) for stage in stages)
    pp, chunks = len(stages), len(stages[0])
    if pp == 1:
        return PipelineTime(pace * batches, pace * batches)
    shown = min(batches, 2 * pp + 2 if chunks == 1 else 2 * pp)
    if chunks > 1:
        shown = -(-shown // pp) * pp
    total = _simulate(stages, shown, send) + (batches - shown) * pace
    return PipelineTime(max(total, pace * batches), pace * batches)


def estimate_pipeline(stages: Sequence[Sequence[ChunkTime]], batches: int, send: Seconds = 0.0) -> PipelineTime:
    """Return the same as `simulate_pipeline` in closed form, quickly and less exactly. The pace is that of the busiest
    stage, or of a micro-batch's round trip where slow sends leave all stages idle. The fill adds the other stages' work
    on a chunk.
    """
    work = [sum(chunk.total for chunk in stage) for stage in stages]
    round_trip = (sum(work) + 2 * (len(stages) - 1) * send) / len(stages)
    busy = max(max(work), round_trip) * batches
    fill = (sum(work) - max(work)) / len(stages[0])
    return PipelineTime(busy + fill + 2 * (len(stages) - 1) * send, busy)


def schedule(pp: int, chunks: int, stage: int, batches: int) -> list[tuple[bool, int, int]]:
    """Return the passes of one stage in order: whether forward, the model chunk and the micro-batch."""
    passes = batches * chunks
    if chunks == 1:
        warm_up = min(pp - stage - 1, passes)
    else:
        warm_up = min(2 * (pp - stage - 1) + (chunks - 1) * pp, passes)

    def place(at: int, forward: bool) -> tuple[bool, int, int]:
        group, inside = divmod(at, pp * chunks)
        chunk = inside // pp
        return forward, chunk if forward else chunks - 1 - chunk, group * pp + inside % pp

    if chunks == 1:
        order = [(True, 0, at) for at in range(warm_up)]
        for at in range(passes - warm_up):
            order += [(True, 0, at + warm_up), (False, 0, at)]
        return order + [(False, 0, at) for at in range(passes - warm_up, passes)]
    order = [place(at, True) for at in range(warm_up)]
    for at in range(passes - warm_up):
        order += [place(at + warm_up, True), place(at, False)]
    return order + [place(at, False) for at in range(passes - warm_up, passes)]


def _simulate(stages: Sequence[Sequence[ChunkTime]], batches: int, send: Seconds) -> Seconds:
    pp, chunks = len(stages), len(stages[0])
    last = pp * chunks - 1
    forwards = [[-1.0] * batches for _ in range(last + 1)]  # ends of the passes, by place in the model and micro-batch
    backwards = [[-1.0] * batches for _ in range(last + 1)]
    orders = [_order(pp, chunks, stage, batches) for stage in range(pp)]
    clock, at = [0.0] * pp, [0] * pp
    ready = list(range(pp))
    waiting: dict[tuple[bool, int, int], int] = {}
    while ready:
        stage = ready.pop()
        order, now = orders[stage], clock[stage]
        for index in range(at[stage], len(order)):
            forward, chunk, batch = order[index]
            place = chunk * pp + stage
            times = stages[stage][chunk]
            ends = forwards if forward else backwards
            if forward:
                before, ended = place - 1, forwards[place - 1][batch] if place else 0.0
            elif place == last:
                before, ended = last, forwards[last][batch]
            else:
                before, ended = place + 1, backwards[place + 1][batch]
            if ended < 0:
                at[stage], clock[stage] = index, now
                waiting[forward or place == last, before, batch] = stage
                break
            start = ended + (send if before != place and (place or not forward) else 0.0)
            now = max(now, start) + (times.forward if forward else times.backward)
            ends[place][batch] = now
            follower = waiting.pop((forward, place, batch), None)
            if follower is not None:
                ready.append(follower)
        else:
            at[stage], clock[stage] = len(order), now
    if any(place < len(order) for place, order in zip(at, orders, strict=True)):
        raise AssertionError("the schedule waits for itself")
    return max(clock)


@lru_cache(maxsize=4096)
def _order(pp: int, chunks: int, stage: int, batches: int) -> list[tuple[bool, int, int]]:
    return schedule(pp, chunks, stage, batches)
