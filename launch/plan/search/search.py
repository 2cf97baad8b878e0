"""Search: every layout that the rules allow, its memory, its time, and the best few in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from core.errors import ConfigError
from launch.plan.calibration import Calibration
from launch.plan.cluster import ClusterConfig
from launch.plan.memory import GIB
from launch.plan.search.config import RunShape, SearchConfig
from launch.plan.search.finalists import Finalists, LayoutPlan, peak, scored
from launch.plan.search.footprint import StateCounts, state_floor, taken
from launch.plan.search.grid import STATE_TOO_LARGE, Table, candidates, layouts
from launch.plan.search.outline import ModelOutline
from launch.plan.search.rules import Columns
from launch.plan.search.speed import StepTimes
from model.config import ModelConfig

TOO_LARGE = "the fullest rank's memory does not fit"
STATE_OR_MEMORY = {TOO_LARGE, STATE_TOO_LARGE}
CHECKED = 4
"""Candidates that are made plans, for each one that is returned. Simulated pipelines may change their order."""
MOST_LARGER = 1 << 16
SHOWN = 3000
"""Candidates that are kept for the picture of memory against speed."""


@dataclass(frozen=True)
class PlannedRun:
    """What is planned. `moments`: dtype of the optimizer's moments, or None."""

    model: ModelConfig
    cluster: ClusterConfig
    run: RunShape
    moments: Any
    muon: bool

    @property
    def moment_bytes(self) -> int:
        return 0 if self.moments is None else int(self.moments.itemsize)


@dataclass(frozen=True)
class SearchResult:
    """The best plans, fastest first, and what became of the other candidates. `points`: bytes and seconds of a sample
    of the candidates that fit.
    """

    plans: list[LayoutPlan]
    tried: int
    fitting: int
    rejected: Counter[str]
    points: np.ndarray


class LayoutSearch:
    """A search on one cluster."""

    def __init__(self, job: PlannedRun, search: SearchConfig, calibration: Calibration) -> None:
        self.job, self.search, self.calibration = job, search, calibration
        self.gpu, self.world = job.cluster.description, job.cluster.gpus
        self.outline = ModelOutline(job.model, job.run)
        self.rejected: Counter[str] = Counter()
        self.layouts = layouts(self.outline, self.gpu, self.world, search, self.rejected)
        self.counts = StateCounts(self.outline, self.layouts, job.moment_bytes, job.muon)
        self.times = StepTimes(self.outline, self.counts, self.gpu, calibration)
        self.limit = self.gpu.memory_gib * GIB * calibration.usable
        """Bytes that a run may allocate."""

    def fitting(self, seen: Callable[[int], None] = lambda count: None) -> list[tuple[Table, np.ndarray]]:
        """Return the candidates that fit, in blocks, with their memory. `seen` gets the number of each block's."""
        found = []
        for block in candidates(
            self.outline, self.gpu, self.layouts, self.search, self.rejected, lambda c: self._floor(c) <= self.limit
        ):
            memory = peak(self.outline, self.counts, block, self.calibration)
            fits = np.flatnonzero(memory <= self.limit)
            self.rejected[TOO_LARGE] += len(memory) - len(fits)
            seen(len(memory))
            if len(fits):
                found.append((taken(block, fits), memory[fits]))
        return found

    def _floor(self, c: Columns) -> np.ndarray:
        return state_floor(self.outline, self.counts, c)

    def __call__(self, best: int) -> SearchResult:
        """Return the fastest plans. Raises `ConfigError` if nothing fits: it says how many GPUs would do."""
        tried: list[int] = []
        blocks = self.fitting(tried.append)
        if not blocks:
            raise self._nothing_fits()
        seconds = [scored(self.times, table) for table, _ in blocks]
        memory, times = np.concatenate([one for _, one in blocks]), np.concatenate(seconds)
        starts = np.cumsum([0, *map(len, seconds)])
        finalists = Finalists(
            self.outline, self.counts, self.gpu, self.times, self.calibration, self.job.moments, self.job.muon
        )
        plans = []
        for place in np.argsort(times, kind="stable")[: CHECKED * best]:
            at = int(np.searchsorted(starts, place, side="right")) - 1
            plans.append(finalists.plan(taken(blocks[at][0], np.array([place - starts[at]]))))
        accepted: list[LayoutPlan] = []
        refusals: list[ConfigError] = []
        for plan in sorted(plans, key=lambda plan: plan.step_s):
            try:
                finalists.check(plan)
                accepted.append(plan)
            except ConfigError as error:
                refusals.append(error)
                self.rejected[f"{error.key}: {error.reason}"] += 1
            if len(accepted) == best:
                break
        if not accepted:
            raise refusals[0]
        points = np.stack([memory, times])
        step = max(1, -(-len(times) // SHOWN))
        rejected = Counter({reason: count for reason, count in self.rejected.items() if count})
        return SearchResult(accepted, sum(tried), len(times), rejected, points[:, ::step])

    def _nothing_fits(self) -> ConfigError:
        """Return the error of a cluster without a layout that fits."""
        cluster = self.job.cluster
        if STATE_OR_MEMORY.isdisjoint(self.rejected):
            reason, count = self.rejected.most_common(1)[0] if self.rejected else ("nothing is allowed", 0)
            return ConfigError(
                "search", None, f"no layout of {self.world:,} GPUs is allowed: {reason} ({count:,} times)"
            )
        factor = 2
        while factor <= MOST_LARGER:
            larger = replace(self.job, cluster=replace(cluster, nodes=cluster.nodes * factor))
            if LayoutSearch(larger, self.search, self.calibration).fitting():
                break
            factor *= 2
        fit = f"{self.world:,} {self.gpu.name} of {self.gpu.memory_gib:.0f} GiB are too few for this model and batch"
        if factor > MOST_LARGER:
            return ConfigError("cluster.nodes", cluster.nodes, f"{fit}, and so are {MOST_LARGER:,} times as many")
        nodes = cluster.nodes * factor
        reason = f"{fit}: the search finds layouts that fit on {nodes * cluster.gpus_per_node:,} GPUs"
        return ConfigError("cluster.nodes", cluster.nodes, reason, [nodes])
