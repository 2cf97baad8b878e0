"""The best candidates, in full: checked by the framework, with a simulated pipeline and the memory of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from core.config import plain
from launch.plan.calibration import Calibration
from launch.plan.cluster import Gpu
from launch.plan.search.config import PlanPrecision
from launch.plan.search.footprint import COMPONENTS, FULL, StateCounts, footprint, of_stages
from launch.plan.search.grid import RECOMPUTE, Table
from launch.plan.search.outline import ModelOutline
from launch.plan.search.rules import SCHEDULES
from launch.plan.search.schedules import SimulatedStep, play
from launch.plan.search.speed import PARTS, StepTimes, total
from parallel.layout import GatherExperts, Layout, ParallelConfig, ReduceEvery
from parallel.parallelize import resolve_layout
from precision.config import Compute, PrecisionConfig

Bytes = dict[str, float]
SIMULATED = 2
"""Micro-batches that are simulated, relative to pp. The middle of a longer step repeats itself."""


@dataclass(frozen=True)
class StageBytes:
    """Bytes by component of the ranks `first`, ... along pp that are alike."""

    first: int
    ranks: int
    parts: Bytes

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class LayoutPlan:
    """A layout with its predictions. `seconds`: by cause, of a step."""

    parallel: ParallelConfig
    layout: Layout
    micro_batch_size: int
    micro_batches: int
    precision: PlanPrecision
    seconds: dict[str, float]
    stages: list[StageBytes]
    simulated: SimulatedStep | None

    @cached_property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @cached_property
    def fullest(self) -> StageBytes:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def memory(self) -> float:
        """Bytes of the fullest rank."""
        return self.fullest.total

    @property
    def words(self) -> str:
        """The layout in short: axes with more than one rank, and what is beside them."""
        axes = [f"{key}{degree}" for key, degree in self.layout.axes.items()]
        if self.layout.pp > 1:
            many = f" x{self.layout.per_rank}" if self.layout.per_rank > 1 else ""
            axes.append(self.layout.schedule.value + many)
        else:
            axes += ["reduce_every=step"] if self.layout.reduce_every is ReduceEvery.step else []
            axes += ["gather_experts=step"] if self.layout.gather_experts is GatherExperts.step else []
        return " ".join(axes) or "one GPU"


class Finalists:
    """Makes plans of candidates."""

    def __init__(
        self,
        outline: ModelOutline,
        counts: StateCounts,
        gpu: Gpu,
        times: StepTimes,
        calibration: Calibration,
        moments: Any,
        muon: bool,
    ) -> None:
        self.outline, self.counts, self.gpu, self.times, self.calibration = outline, counts, gpu, times, calibration
        self.moments, self.muon = moments, muon

    def plan(self, c: Table) -> LayoutPlan:
        """Return the plan of a table of one row. `check` it before it is used."""
        value = {name: column[0].item() for name, column in c.items()}
        precision = PlanPrecision.fp8 if value["fp8"] else PlanPrecision.bf16
        parallel = self._parallel(value)
        layout = parallel.resolve(value["pp"] * value["dp"] * value["cp"] * value["tp"])
        seconds = {name: column.item() for name, column in self.times(c).items()}
        simulated = None
        if layout.pp > 1:
            simulated, seconds["bubble"] = self._simulate(c, layout, value, seconds)
        rows = of_stages(self.outline, self.counts, c, self.calibration)
        stages = [StageBytes(first, ranks, {k: v.item() for k, v in parts.items()}) for first, ranks, parts in rows]
        return LayoutPlan(
            parallel,
            layout,
            value["micro_batch_size"],
            value["micro_batches"],
            precision,
            {name: seconds[name] for name in PARTS},
            sorted(stages, key=lambda stage: stage.first),
            simulated,
        )

    def check(self, plan: LayoutPlan) -> None:
        """Make the checks that `train` makes of the layout and the batch. Raises the same `ConfigError`."""
        model, run = self.outline.model, self.outline.run
        config = PrecisionConfig(compute=Compute.bfloat16, backend=plan.precision.backend)
        layout = resolve_layout(plan.parallel, plan.layout.world_size, model, config, self.moments, self.muon)
        layout.check_batch(run.global_batch_size, plan.micro_batch_size)
        layout.check_seq_len(model, run.seq_len)

    def _parallel(self, value: dict[str, Any]) -> ParallelConfig:
        schedule, pp, experts = SCHEDULES[value["schedule"]], value["pp"], value["ep"] * value["etp"]
        degrees = {name: value[name] for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")}
        node = self.gpu.domain
        several = experts > node and experts % node == 0 and node % value["etp"] == 0
        chosen: dict[str, Any] = {"recompute": RECOMPUTE[value["recompute"]]}
        if several and self.outline.model.has_experts and self.outline.model.router.top_k * value["etp"] > 1:
            chosen["exchange_node_size"] = node
        if pp > 1:
            chosen["schedule"] = schedule
            if not schedule.is_single:
                chosen["stages_per_rank"] = value["per_rank"]
        else:
            chosen["reduce_every"] = ReduceEvery.step if value["reduce_once"] else ReduceEvery.micro_batch
            chosen["gather_experts"] = GatherExperts.step if value["gather_once"] else GatherExperts.each_pass
        return ParallelConfig(**degrees, **chosen)

    def _simulate(
        self, c: Table, layout: Layout, value: dict[str, Any], seconds: dict[str, float]
    ) -> tuple[SimulatedStep, float]:
        """Return the simulated pipeline, and the seconds of a step in which its busiest rank has no work."""
        layers, head = self.times.tables(c)
        of_layer = layers[:, :, 0].sum(1)[self.outline.kind_of]
        plan = layout.stages(self.outline.model)
        stage_s = [float(of_layer[list(one)].sum()) for one in plan.layers]
        stage_s[-1] += float(head[0])
        again = value["recompute"] == FULL
        shares = (
            {"F": 1 / 4, "B": 3 / 4, "I": 1 / 2, "W": 1 / 4} if again else dict.fromkeys("FIW", 1 / 3) | {"B": 2 / 3}
        )
        batches, pp, per_rank = value["micro_batches"], layout.pp, layout.per_rank
        shown = min(batches, SIMULATED * pp)
        while not layout.schedule.accepts(shown, pp, per_rank):
            shown += 1
        found = play(layout.schedule, pp, per_rank, shown, lambda kind, stage: shares[kind] * stage_s[stage])
        idle = found.step - max(found.busy)
        return found, idle + 2 * (pp - 1) * float(self.times.send(c)[0])


def scored(times: StepTimes, c: Table) -> np.ndarray:
    """Return the seconds of a step of each candidate."""
    return total(times(c))


def peak(outline: ModelOutline, counts: StateCounts, c: Table, calibration: Calibration) -> np.ndarray:
    """Return the bytes of the fullest rank of each candidate."""
    found = footprint(outline, counts, c, calibration)
    return np.asarray(sum(found[name] for name in COMPONENTS))


def as_values(plan: LayoutPlan) -> dict[str, Any]:
    """Return the section `parallel` of a run, without what has its default."""
    values, defaults = plain(plan.parallel), plain(ParallelConfig())
    kept = {key: value for key, value in values.items() if value != defaults[key]}
    return {key: values[key] for key in ("pp", "dp_replicate", "cp", "tp", "ep", "etp")} | kept
