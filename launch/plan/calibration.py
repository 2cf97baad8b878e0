"""Constants of the planner."""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan.workload import Job, LossKernel


@dataclass(frozen=True)
class Calibration:
    dispatch_copies: float = 0.5
    imbalance: float = 1.0
    base_mib: float = 32.0
    nanotron_base_mib: float = 72.0
    router_copies: float = 1.0

    def logit_bytes(self, job: Job) -> float:
        """Bytes per logit at the loss's peak. Plain: bf16 logits and their fp32 copy."""
        return {LossKernel.plain: 6.0, LossKernel.compiled: 10.0, LossKernel.fused: 4.0, LossKernel.chunked: 0.5}[
            job.loss
        ]
