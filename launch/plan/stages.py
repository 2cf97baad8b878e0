"""Split a model over pipeline stages as the frameworks do it, and count the parameters of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from core.errors import ConfigError
from launch.plan.workload import Job, Shapes, Software


@dataclass(frozen=True)
class PlanStage:
    """What one pipeline stage holds: the layers of each of its model chunks, and perhaps embedding and head."""

    chunks: tuple[tuple[int, ...], ...]
    embedding: bool
    head: bool

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for chunk in self.chunks for layer in chunk)


@dataclass(frozen=True)
class LocalParameters:
    """Parameters of one rank. Experts are apart, since they have data parallelism of their own."""

    dense: float
    experts: float

    @property
    def total(self) -> float:
        return self.dense + self.experts


@lru_cache(maxsize=4096)
def split_layers(job: Job) -> list[PlanStage]:
    """Return the stages of a job, first to last."""
    shapes, axes = job.shapes, job.axes
    if job.software is Software.nanotron:
        counts = _by_cost(shapes, axes.pp)
    else:
        counts = _evenly(shapes, axes.pp * axes.vpp, job.edges)
    if min(counts) < 0 or sum(counts) != shapes.layers:
        reason = f"{shapes.layers} layers do not fill {len(counts)} chunks"
        raise ConfigError("pp", axes.pp, reason)
    layers = iter(range(shapes.layers))
    chunks = [tuple(next(layers) for _ in range(count)) for count in counts]
    if shapes.mtp:
        chunks[-1] += tuple(range(shapes.layers, shapes.layers + shapes.mtp))
    stages = [tuple(chunks[stage :: axes.pp]) for stage in range(axes.pp)]
    return [PlanStage(found, at == 0, at == axes.pp - 1) for at, found in enumerate(stages)]


def _evenly(shapes: Shapes, chunks: int, edges: tuple[int, int] | None) -> list[int]:
    """Return the layers of each chunk. If they do not divide, embedding, head and MTP fill the place of a layer each,
    as in the layouts that recipes state for DeepSeek-V3, and the middle takes the rest.
    """
    layers = shapes.layers
    if edges is not None and chunks > 2:
        first, last = edges
        count, rest = divmod(layers - first - last, chunks - 2)
        return [first, *[count + (at < rest) for at in range(chunks - 2)], last]
    if layers % chunks == 0:
        return [layers // chunks] * chunks
    tail = 1 + shapes.mtp
    count, rest = divmod(layers + 1 + tail, chunks)
    start = max(0, (chunks - rest) // 2)
    sizes = [count + (start <= at < start + rest) for at in range(chunks)]
    for at, extra in ((0, 1), (chunks - 1, tail)):
        taken = min(sizes[at], extra)
        sizes[at] -= taken
        for more in range(extra - taken):  # too small a chunk: its neighbours give up layers
            sizes[1 + more % (chunks - 2) if chunks > 2 else 0] -= 1
    return sizes


def _by_cost(shapes: Shapes, pp: int) -> list[int]:
    """Return nanotron's split: blocks by the cumulative cost of their matrices, in which the head counts and the
    embedding does not. A stage ends with the block that reaches its share.
    """
    layer = shapes.attention_parameters + shapes.dense_parameters
    costs: Sequence[int] = [0, *[layer] * shapes.layers, shapes.vocab * shapes.hidden]
    total, reached, stage, counts = sum(costs), 0, 0, [0] * pp
    for at, cost in enumerate(costs):
        counts[stage] += 1 <= at <= shapes.layers
        reached += cost
        if stage < pp - 1 and reached * pp >= total * (stage + 1):
            stage += 1
    return counts


@lru_cache(maxsize=16384)
def parameters(job: Job, stage: PlanStage) -> LocalParameters:
    """Return the parameters that one rank of a stage holds, before any sharding by data parallelism."""
    shapes, axes = job.shapes, job.axes
    dense, experts, h = 0.0, 0.0, shapes.hidden
    for layer in stage.layers:
        crossed = shapes.encoder is not None and layer >= shapes.encoder.layers
        dense += (1 + crossed) * shapes.attention_parameters / axes.tp + 2 * h
        if shapes.latent is not None:  # the down projections are not split
            latent = shapes.latent
            whole = h * ((latent.query_rank or 0) + latent.key_rank + latent.rope_dim)
            dense += whole * (1 - 1 / axes.tp)
        if shapes.biases:
            dense += (shapes.query_size + 2 * shapes.key_size) / axes.tp + 3 * h
        if shapes.is_moe[layer] and shapes.experts is not None:
            moe = shapes.experts
            dense += shapes.shared_parameters / axes.tp + moe.count * h
            experts += moe.count / axes.ep * shapes.expert_parameters / axes.etp
        else:
            dense += shapes.dense_parameters / axes.tp + (shapes.ffn / axes.tp + h if shapes.biases else 0)
        if layer >= shapes.layers:
            dense += 2 * h * h
    table = shapes.vocab * h / axes.tp
    if stage.embedding or (shapes.mtp and stage.head):  # later tokens are embedded again where MTP runs
        dense += table + shapes.learned_positions * h
    if stage.head and not (shapes.tied and axes.pp == 1):
        dense += table
    if stage.head:
        dense += h
    return LocalParameters(dense, experts)
