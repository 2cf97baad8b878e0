"""Constants of the planner."""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan.workload import Job


@dataclass(frozen=True)
class Calibration:
    dispatch_copies: float = 1.0
    router_copies: float = 1.0

    def logit_bytes(self, job: Job) -> float:
        return 10.0 if job.fused_loss else 6.0
