"""Predict the speed and the memory of a run before it starts, and store both in its directory.

`train` logs them beside what it measures, and the report shows both.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from core.files import write_json
from core.process import say
from launch.config import LaunchConfig, LaunchKind
from launch.plan.calibration import Calibration, default_calibration
from launch.plan.cluster import ClusterConfig, find_gpu
from launch.plan.memory import GIB
from launch.plan.search.config import RunShape
from launch.plan.search.finalists import Finalists, LayoutPlan
from launch.plan.search.footprint import StateCounts
from launch.plan.search.grid import RECOMPUTE, Table
from launch.plan.search.outline import ModelOutline
from launch.plan.search.report import SearchReport
from launch.plan.search.rules import SCHEDULES
from launch.plan.search.search import PlannedRun, SearchResult
from launch.plan.search.speed import StepTimes
from parallel.layout import ContextMethod, EngineKind, GatherExperts, Layout, ReduceEvery
from precision.config import Compute, ParamDtype
from train.config import Objective, TrainConfig, check
from train.optim.config import OptimizerKind
from train.run_directory import RunDirectory

DEVICES = {
    "NVIDIA A100-SXM4-40GB": "A100-40G",
    "NVIDIA A100-SXM4-80GB": "A100-80G",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H800": "H800",
    "NVIDIA H200": "H200",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
}
"""GPUs by their exact device name: cards of one chip differ in clock, power and links."""
IMBALANCE = 1.3
"""Routed tokens of the fullest expert rank over the mean."""


def announce(config: TrainConfig, launch: LaunchConfig, device: str | None = None) -> None:
    """Print the prediction of a run and store it in the run's directory, if the GPU is known and the planner knows all
    that the run uses. `device`: name of the GPU; None: this machine's.
    """
    if device is None:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    ranks = 1 if launch.kind is LaunchKind.inline else launch.ranks
    if device not in DEVICES or config.run.name is None:
        return
    found = prediction(config, cluster_of(DEVICES[device], launch, ranks), default_calibration())
    if found is not None:
        path = RunDirectory.of(config).prediction
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        rates, sizes = found["tokens_per_second_between"], [size / GIB for size in found["memory_bytes_between"]]
        speed = f"{found['tokens_per_second']:,.0f} tok/s ({rates[0]:,.0f} to {rates[1]:,.0f})"
        say(f"planned: {speed}, {found['memory_bytes'] / GIB:.1f} GiB ({sizes[0]:.1f} to {sizes[1]:.1f})")


def cluster_of(name: str, launch: LaunchConfig, ranks: int) -> ClusterConfig:
    """Return the cluster of a run, with the data sheet's links."""
    gpu, nodes = find_gpu(name), 1 if launch.kind is LaunchKind.inline else launch.nodes
    node = ranks // nodes
    domain = gpu.domain if gpu.domain % node == 0 else node
    return ClusterConfig(gpu.name, nodes, node, max(domain, 1), gpu.nvlink, gpu.network)


def prediction(config: TrainConfig, cluster: ClusterConfig, calibration: Calibration) -> dict[str, Any] | None:
    """Return the predicted speed and memory of the first phase; None for a run that the planner does not model."""
    layout, first = check(config, cluster.gpus), config.training
    is_known = (
        layout.engine is EngineKind.fsdp2
        and (layout.cp == 1 or layout.cp_method is ContextMethod.gather)
        and layout.layers_per_stage is None
        and first.objective is Objective.language
        and not first.freeze
        and config.model.vision is None
        and config.precision.compute is Compute.bfloat16
        and config.precision.param_dtype is ParamDtype.master
    )
    if not is_known:
        return None
    run = RunShape(first.seq_len, first.global_batch_size, IMBALANCE)
    moments = config.optimizer.moments_dtype(config.precision)
    job = PlannedRun(config.model, cluster, run, moments, config.optimizer.kind is OptimizerKind.muon)
    row = _row(layout, config, run)
    plan = _plan(job, row, calibration)
    report = SearchReport(job, SearchResult([plan], 1, 1, Counter(), np.zeros((2, 0))))
    time, memory = report.bar(plan, "time"), report.bar(plan, "memory")
    rate = report.rate(plan) * cluster.gpus
    return {
        "gpu": cluster.gpu,
        "tokens_per_second": rate,
        "tokens_per_second_between": [rate / time.high, rate / time.low],
        "memory_bytes": plan.memory,
        "memory_bytes_between": [plan.memory * memory.low, plan.memory * memory.high],
        "seconds": plan.seconds,
    }


def _plan(job: PlannedRun, row: Table, calibration: Calibration) -> LayoutPlan:
    outline, gpu = ModelOutline(job.model, job.run), job.cluster.description
    counts = StateCounts(outline, row, job.moment_bytes, job.muon)
    times = StepTimes(outline, counts, gpu, calibration)
    return Finalists(outline, counts, gpu, times, calibration, job.moments, job.muon).plan(row)


def _row(layout: Layout, config: TrainConfig, run: RunShape) -> Table:
    """Return a layout as a table of one candidate."""
    degrees = {name: getattr(layout, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")}
    sequences, size = run.global_batch_size // layout.dp, config.training.micro_batch_size
    piped = layout.pp > 1
    choices = {
        "dp": layout.dp,
        "fsdp": layout.fsdp,
        "efsdp": layout.efsdp,
        "sequences": sequences,
        "micro_batches": sequences // size,
        "micro_batch_size": size,
        "schedule": SCHEDULES.index(layout.schedule),
        "per_rank": layout.per_rank,
        "recompute": RECOMPUTE.index(layout.recompute),
        "reduce_once": piped or layout.reduce_every is ReduceEvery.step,
        "gather_once": piped or layout.gather_experts is GatherExperts.step,
        "fp8": config.precision.uses_float8,
        "layout": 0,
    }
    return {name: np.array([value]) for name, value in (degrees | choices).items()}
