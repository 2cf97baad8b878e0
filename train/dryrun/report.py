"""Sum up what the walked ranks of a dry run did: as tables for the terminal, and as plain JSON."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Sequence
from typing import Any

from core.errors import counted
from parallel.checks.deadlock import deadlocks_among
from parallel.checks.memory import Peak
from parallel.checks.recorder import Issued
from parallel.layout import Layout
from train.dryrun.step import GRADIENTS, OPTIMIZER, PARAMETERS
from train.dryrun.walk import RankWalk

GIB = 2**30
FIRST = 4
"""Faults that the terminal shows."""


def ranks_of_each_kind(layout: Layout) -> list[int]:
    """Return one rank of each kind: the first of each pipeline stage, those of the first group of experts, and the last
    rank of all, whose shards may be the smallest.
    """
    of_stage = layout.world_size // layout.pp
    stages = range(0, layout.world_size, of_stage)
    return sorted({*stages, *range(layout.ep * layout.etp), layout.world_size - 1})


def faults(walks: Sequence[RankWalk]) -> dict[str, list[str]]:
    """Return the deadlocks among the walked ranks, and the races between the streams of each."""
    races = [f"rank {one.rank}: {race}" for one in walks for race in one.step.races]
    return {"deadlocks": deadlocks_among({one.rank: one.step.issued for one in walks}), "races": races}


def rank_lines(walk: RankWalk) -> Iterator[str]:
    """Yield the lines of one rank."""
    step = walk.step
    place = ", ".join(f"{axis} {index}" for axis, index in walk.place.items())
    yield f"rank {walk.rank}" + (f" ({place})" if place else "")
    for kind in (PARAMETERS, GRADIENTS, OPTIMIZER):
        yield f"  {kind:<24}{_gib(getattr(step, kind))}"
    yield f"  {'peak of activations':<24}{_gib(step.activations.bytes)}"
    yield f"  {'peak of all tensors':<24}{_gib(step.peak.bytes)}   during {step.peak.during}:"
    for kind, size in sorted(step.peak.by_kind.items(), key=lambda item: -item[1]):
        yield f"    {kind:<22}{_gib(size)}"
    calls = _calls(walk)
    yield f"  {'axis':<14}{'operation':<22}{'calls':>8}{'GiB':>10}"
    for (axis, operation), (count, size) in sorted(calls.items(), key=lambda item: -item[1][1]):
        yield f"  {axis:<14}{operation:<22}{count:>8,}{size / GIB:>10.3f}"
    launches, syncs = step.launches.total(), step.syncs.total()
    yield f"  {counted(launches, 'launch').replace('launchs', 'launches')}, the host waits {counted(syncs, 'time')}"


def fault_lines(found: dict[str, list[str]], ranks: int) -> Iterator[str]:
    """Yield a line for each check, and the first faults."""
    for check, faults_of_check in found.items():
        yield f"{check} among {counted(ranks, 'walked rank')}: {len(faults_of_check) or 'none'}"
        yield from (f"  {fault}" for fault in faults_of_check[:FIRST])


def plain_walk(walk: RankWalk) -> dict[str, Any]:
    """Return one rank's record as plain JSON. `order` has a row for each collective and message: operation, group,
    bytes, dtype and, for a message, the other rank.
    """
    step = walk.step
    groups = {one.group: one.ranks for one in step.issued if one.group}
    return {
        "rank": walk.rank,
        "place": walk.place,
        "bytes": {kind: getattr(step, kind) for kind in (PARAMETERS, GRADIENTS, OPTIMIZER)},
        "peak": _plain_peak(step.peak),
        "activations": _plain_peak(step.activations),
        "traffic": [{"axis": axis, "purpose": why, "bytes": size} for (axis, why), size in step.traffic.items()],
        "calls": [
            {"axis": axis, "operation": operation, "calls": count, "bytes": size}
            for (axis, operation), (count, size) in _calls(walk).items()
        ],
        "groups": {name: {"axis": walk.axes[name], "ranks": _short(ranks)} for name, ranks in groups.items()},
        "order": [_row(one) for one in step.issued if one.group],
        "launches": dict(step.launches.most_common()),
        "host_waits": dict(step.syncs.most_common()),
    }


def _calls(walk: RankWalk) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the number of calls and the bytes handed over, by axis and operation."""
    calls, sizes = Counts[tuple[str, str]](), Counts[tuple[str, str]]()
    for one in walk.step.issued:
        if one.group:
            key = walk.axes[one.group], one.operation
            calls[key] += 1
            sizes[key] += one.bytes
    return {key: (calls[key], sizes[key]) for key in calls}


def _row(one: Issued) -> list[Any]:
    return [one.operation, one.group, one.bytes, *one.dtypes[:1], *([one.peer] if one.peer >= 0 else [])]


def _short(ranks: tuple[int, ...]) -> list[int] | dict[str, int]:
    """Return ranks at equal distances by the first of them, the distance and their number."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if ranks != tuple(range(ranks[0], ranks[0] + step * len(ranks), step)):
        return list(ranks)
    return {"first": ranks[0], "step": step, "count": len(ranks)}


def _plain_peak(peak: Peak) -> dict[str, Any]:
    return {"bytes": peak.bytes, "by_kind": peak.by_kind, "during": peak.during}


def _gib(size: int) -> str:
    return f"{size / GIB:>10.3f} GiB"
