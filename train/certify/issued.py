"""Certify what the ranks of a layout issue: no races between streams, no deadlocks, gathers ahead of their use.

A short run is recorded on CPUs: see `parallel.checks`. On a GPU the same code issues the same collectives and uses the
same streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel.checks.deadlock import deadlocks
from parallel.checks.order import late_gathers
from parallel.checks.recorder import Issued, recording
from parallel.comm.world import connect
from parallel.layout import EngineKind, ParallelConfig
from parallel.mesh import make_meshes
from precision.config import Compute, PrecisionConfig
from train.certify.worker import CertifyCase, RunOnRanks, run_case
from train.optim.config import OptimizerConfig

RACES, DEADLOCKS, LATE = "races", "deadlocks", "late gathers"


@dataclass(frozen=True)
class RankRecord:
    """What a rank issued in order, and the races between its streams."""

    issued: list[Issued]
    races: list[str]


def record_case(parallel: ParallelConfig, case: CertifyCase) -> RankRecord:
    """Run a case on this rank and record it. `torch.compile` would hide the operations, so the run is eager."""
    world = connect()
    meshes = make_meshes(replace(parallel, compile=False).resolve(world.size), world)
    with recording() as recorder:
        run_case(case, world, meshes)
    return RankRecord(recorder.issued, [str(race) for race in recorder.machine.races])


def issued_faults(parallel: ParallelConfig, case: CertifyCase, count: int, ranks: RunOnRanks) -> dict[str, list[str]]:
    """Return the faults of two steps in mixed precision, by check. DeepSpeed is checked for deadlocks only: it does not
    take its streams from where the recorder sees them. Raises `RankFailure` if a rank fails.
    """
    mixed = PrecisionConfig(Compute.bfloat16)
    case = replace(case, precision=mixed, optimizer=OptimizerConfig(lr=1e-2), clip_norm=0.05, steps=2)
    records = ranks(count, record_case, parallel, case)
    return faults(records, parallel.engine is EngineKind.fsdp2)


def faults(records: Sequence[RankRecord], with_streams: bool = True) -> dict[str, list[str]]:
    """Return the faults in the records of all ranks, by check."""
    found = {DEADLOCKS: deadlocks([record.issued for record in records])}
    if with_streams:
        found[RACES] = [f"rank {rank}: {race}" for rank, record in enumerate(records) for race in record.races]
        late = [(rank, gather) for rank, record in enumerate(records) for gather in late_gathers(record.issued)]
        found[LATE] = [f"rank {rank}: {gather}" for rank, gather in late]
    return found
