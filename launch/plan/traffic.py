"""Bytes of the collectives on each rank, and over which links they go. Formulas: docs/plan.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launch.plan.stages import PlanStage, parameters
from launch.plan.workload import Job, Sharding, Software


@dataclass(frozen=True)
class Exchange:
    """A kind of collective: what one rank sends over each kind of link, in bytes, and its number of messages."""

    axis: str
    purpose: str
    nvlink_bytes: float
    network_bytes: float
    messages: float
    span: int = 0
    """GPUs over which the ranks of a group are spread."""


def _ring(job: Job, axis: str, purpose: str, size: float, ranks: int, span: int, calls: int = 1) -> Exchange:
    """Return ring collectives over `ranks` that lie within `span` neighbouring GPUs: each sends (n-1)/n of `size`.

    Where the ranks fill several NVLink domains, a ring crosses from domain to domain once, and as many rings as there
    are members in a domain share the traffic, each with a network card of its own.
    """
    sent = size * (ranks - 1) / ranks
    if span <= job.gpu.domain:
        return Exchange(axis, purpose, sent, 0.0, calls * (ranks - 1))
    stride = max(1, span // ranks)
    members = max(1, min(ranks, job.gpu.domain // stride))
    if job.software is Software.deepspeed:
        members = 1
    return Exchange(axis, purpose, sent, sent / members, calls * (ranks - 1), span)


def layer_exchanges(job: Job, is_moe: bool) -> Iterator[Exchange]:
    """Yield the collectives of one layer and micro-batch, both passes."""
    axes, shapes = job.axes, job.shapes
    again = 1 if job.recomputes_all else 0
    if axes.tp > 1:
        unit = 2.0 * job.tokens * shapes.hidden
        pairs = 1 if is_moe and axes.etp == 1 else 2  # attention, and the MLP if it is split
        calls = pairs * (4 + (1 if axes.sequence_parallel else 0) + 2 * again)
        yield _ring(job, "tp", "activations", unit * calls, axes.tp, axes.tp, calls)
    if axes.cp > 1:
        keys = 2.0 * job.tokens * 2 * shapes.key_size / axes.tp
        yield _ring(job, "cp", "keys", keys * axes.cp * (3 + again), axes.cp, axes.cp * axes.tp, 1)
    if is_moe and "once_per_rank" in job.traits and axes.ep * axes.etp > 1:
        yield _once_per_rank(job, 4 + 2 * again)
    elif is_moe and shapes.experts is not None and axes.ep > 1:
        yield _all_to_all(job, 4 + 2 * again)


def _all_to_all(job: Job, calls: int) -> Exchange:
    """Return the dispatches and combinations of a MoE layer. A modern kernel sends a token once to each remote domain;
    NCCL's all-to-all sends it once for each expert.
    """
    axes, moe = job.axes, job.shapes.experts
    assert moe is not None
    token = 2.0 * job.tokens / axes.tp * axes.etp * job.shapes.hidden
    inside = max(1, min(axes.ep, job.gpu.domain // max(1, axes.etp)))
    domains = axes.ep / inside
    local = token * moe.top_k * (inside - 1) / axes.ep
    remote = token * moe.top_k * (1 - inside / axes.ep)
    old = job.released < 2024.5 or job.software in (Software.nanotron, Software.deepspeed)
    if "plain_all_to_all" not in job.traits and not old and domains > 1:
        hit = (domains - 1) * (1 - (1 - 1 / domains) ** moe.top_k)
        if moe.groups is not None:  # routing limited to some groups of experts, and so to as many domains
            hit = min(hit, moe.groups * (domains - 1) / domains)
        remote = min(remote, token * hit)
        local += token * moe.top_k * (1 - inside / axes.ep)  # forwarded inside the domain
    return Exchange("ep", "tokens", local * calls, remote * calls, calls)


def _once_per_rank(job: Job, calls: int) -> Exchange:
    """Return the dispatches and combinations of our own exchange (`parallel.expert_parallel`): a token travels once to
    each rank of its experts and of their slices, and to each NVLink domain once, where it is passed on.
    """
    axes, moe = job.axes, job.shapes.experts
    assert moe is not None
    experts, top_k, ranks = moe.count, moe.top_k, axes.ep * axes.etp

    def hit(groups: float) -> float:
        """Mean number of groups of experts that have some of a token's experts, equally likely."""
        return groups * (1 - (1 - 1 / groups) ** min(top_k, experts)) if groups > 1 else 1.0

    token = 2.0 * job.tokens / axes.tp * job.shapes.hidden
    domains = max(1.0, ranks / job.gpu.domain)
    sent = token * axes.etp * hit(axes.ep) * (1 - 1 / ranks)
    across = token * hit(domains) * (1 - 1 / domains)
    return Exchange("ep", "tokens", sent * calls, across * calls, calls)


def state_exchanges(job: Job, stage: PlanStage) -> Iterator[Exchange]:
    """Yield the collectives of data parallelism: once per step, or per micro-batch where parameters are sharded."""
    axes = job.axes
    local = parameters(job, stage)
    gradient = 4.0 if job.software in (Software.megatron, Software.nanotron) else 2.0
    if "bf16_gradients" in job.traits:
        gradient = 2.0
    parts = [("dp", local.dense, axes.dp * axes.cp, axes.dense_ranks)]
    if local.experts:
        parts.append(("expert dp", local.experts, axes.expert_dp, axes.dense_ranks))
    for purpose, size, ranks, span in parts:
        if ranks == 1:
            continue
        if job.sharding is Sharding.parameters:
            yield _ring(job, "dp", f"{purpose} parameters", 2 * 2.0 * size, ranks, span, 2 * len(stage.layers))
            yield _ring(job, "dp", f"{purpose} gradients", 2.0 * size, ranks, span, len(stage.layers))
            continue
        gathered = gradient if job.sharding is Sharding.none else 2.0
        yield _ring(job, "dp", f"{purpose} gradients", gradient * size, ranks, span)
        yield _ring(job, "dp", f"{purpose} parameters", gathered * size, ranks, span)
