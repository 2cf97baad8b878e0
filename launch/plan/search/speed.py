"""Step time of our own code, for arrays of candidates.

The time of a layer is that of `launch.plan.step_time`, which published runs validate. It is computed once for each
combination of what it depends on, and looked up. Pipelines are in closed form here; `launch.plan.search.finalists`
simulates those of the best candidates.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from launch.plan.calibration import Calibration
from launch.plan.cluster import Generation, Gpu
from launch.plan.search.footprint import FULL, MASTER, NARROW, StateCounts, groups, taken
from launch.plan.search.grid import RECOMPUTE, Table
from launch.plan.search.outline import ModelOutline
from launch.plan.search.rules import SCHEDULES
from launch.plan.step_time import CAUSES, expert_time, head_time, layer_time
from launch.plan.workload import Axes, Job, ProductDtype, Shapes, Sharding, Software
from parallel.layout import Recompute
from parallel.pipeline.stages import PipelineSchedule

PARTS = (*CAUSES, "imbalance", "head", "bubble", "data", "optimizer")
"""Parts of a step, in the order in which tables and pictures show them."""
RELEASED = 2026.9
_MODULES = {
    Recompute.none: frozenset[str](),
    Recompute.selective: frozenset({"layernorm", "moe_act", "mlp"}),
    Recompute.full: frozenset({"full"}),
}
"""What each mode recomputes, in the words of `launch.plan.step_time`."""
_FILL = {
    PipelineSchedule.gpipe: 1.0,
    PipelineSchedule.one_f_one_b: 1.0,
    PipelineSchedule.interleaved: 1.0,
    PipelineSchedule.interleaved_zero_bubble: 1 / 3,
    PipelineSchedule.zbv: 1 / 3,
    PipelineSchedule.dualpipev: 2 / 3,
}
"""Idle passes while the pipeline fills, relative to 1F1B: `launch.plan.search.schedules`."""


class StepTimes:
    """Times of candidates on one cluster."""

    def __init__(self, outline: ModelOutline, counts: StateCounts, gpu: Gpu, calibration: Calibration) -> None:
        self.outline, self.counts, self.gpu, self.calibration = outline, counts, gpu, calibration
        self.shapes = [outline.shapes(kind) for kind in range(len(outline.kinds))]
        self._layer = lru_cache(maxsize=None)(self._layer_times)

    def job(self, shapes: Shapes, tp: int, cp: int, ep: int, etp: int, mbs: int, recompute: int, fp8: bool) -> Job:
        """Return a job of one layer, as the planner's model of time wants it."""
        blackwell = self.gpu.generation is Generation.blackwell
        dtype = (ProductDtype.mxfp8 if blackwell else ProductDtype.fp8) if fp8 else ProductDtype.bf16
        return Job(
            shapes,
            Axes(tp=tp, cp=cp, ep=ep, etp=etp, dp=ep * etp),
            self.gpu,
            seq=self.outline.run.seq_len,
            mbs=mbs,
            gbs=mbs * ep * etp,
            precision=dtype,
            sharding=Sharding.parameters,
            software=Software.fsdp2,
            released=RELEASED,
            traits=frozenset({"once_per_rank"}),
            recompute=_MODULES[RECOMPUTE[recompute]],
        )

    def _layer_times(self, *key: int) -> tuple[np.ndarray, float]:
        """Return seconds of one micro-batch: a row of causes per kind of layer, and the head's."""
        tp, cp, ep, etp, mbs, recompute, fp8 = key
        rows = []
        for shapes in self.shapes:
            job = self.job(shapes, tp, cp, ep, etp, mbs, recompute, bool(fp8))
            found = layer_time(job, 0, self.calibration)
            uneven = (self.outline.run.imbalance - 1) * (ep > 1) * expert_time(job, 0, self.calibration)
            rows.append([*(getattr(found, name) for name in CAUSES), uneven])
        return np.array(rows), head_time(job, self.calibration)

    def tables(self, c: Table) -> tuple[np.ndarray, np.ndarray]:
        """Return seconds of one micro-batch: [kinds, causes, candidates] of a layer, then of the head."""
        keys = np.stack([c[name] for name in ("tp", "cp", "ep", "etp", "micro_batch_size", "recompute", "fp8")])
        values, inverse = np.unique(keys, axis=1, return_inverse=True)
        found = [self._layer(*key) for key in values.T.tolist()]
        layers, heads = zip(*found, strict=True)
        inverse = inverse.reshape(-1)
        return np.stack(layers, -1)[..., inverse], np.array(heads)[inverse]

    def send(self, c: Table) -> np.ndarray:
        """Return the seconds between the end of a stage's pass and the start of the next one's."""
        gpu, fit = self.gpu, self.calibration
        size = NARROW * c["micro_batch_size"] * self.outline.run.seq_len / c["cp"] / c["tp"]
        near = c["pp"] * c["dp"] * c["cp"] * c["tp"] <= gpu.domain
        link = np.where(near, gpu.nvlink * fit.nvlink, gpu.network * fit.network)
        return np.asarray(fit.send_s + size * self.outline.model.hidden_size / (link * 1e9))

    def __call__(self, c: Table) -> Table:
        """Return the seconds of a step of each candidate by cause, of its slowest rank."""
        found = {name: np.zeros(len(c["pp"])) for name in PARTS}
        for places, pp, per_rank, is_v in groups(c):
            part = taken(c, places)
            for name, value in self._of_pipeline(part, *self.outline.rows(pp, per_rank, is_v)[:2]).items():
                found[name][places] = value
        return found

    def _of_pipeline(self, c: Table, rows: np.ndarray, ranks: np.ndarray) -> Table:
        layers, head = self.tables(c)
        batches = c["micro_batches"]
        of_layer = layers.sum(1)  # [kinds, candidates]
        work = rows[:, :-2] @ of_layer + rows[:, -1:] * head
        busiest = work.argmax(0)
        pace = work.max(0)
        row = rows[busiest]
        parts = {name: batches * (row[:, :-2].T * layers[:, at]).sum(0) for at, name in enumerate((*CAUSES, "uneven"))}
        parts["imbalance"] = parts.pop("uneven")
        parts["head"] = batches * row[:, -1] * head
        pp = int(ranks.sum())
        factor = np.array([_FILL[one] for one in SCHEDULES])[c["schedule"]] / c["per_rank"]
        parts["bubble"] = (
            ((ranks @ work - pace) * factor + 2 * (pp - 1) * self.send(c)) if pp > 1 else np.zeros(len(head))
        )
        backward = pace * np.where(c["recompute"] == FULL, 3 / 4, 2 / 3)
        waits = [self._data_time(one, c, pace, backward) for one in rows]
        parts["data"] = np.max(waits, axis=0)
        parts["optimizer"] = np.max([self._optimizer_time(one, c) for one in rows], axis=0)
        return parts

    def _data_time(self, row: np.ndarray, c: Table, work: np.ndarray, backward: np.ndarray) -> np.ndarray:
        """Return the seconds per step that a rank waits for FSDP2's gathers and reductions. Without a pipeline each
        micro-batch gathers parameters for both passes, and may reduce gradients; the rest happens once per step.
        """
        layout, fit = c["layout"], self.calibration
        dense, experts = row @ self.counts.dense[:, layout], row @ self.counts.experts[:, layout]
        layers = float(row[:-2].sum())
        stage = c["dp"] * c["cp"] * c["tp"]
        shard = stage // c["dp_replicate"]
        once, several = np.zeros(len(dense)), np.zeros(len(dense))
        kinds = ((dense, c["fsdp"], c["reduce_once"]), (experts, c["efsdp"], c["gather_once"] | c["reduce_once"]))
        for is_experts, (size, ranks, reduces_once) in enumerate(kinds):
            gather = self._ring(NARROW * size, ranks, shard, layers)
            reduce = self._ring(MASTER * size, ranks, shard, layers)
            kept = (c["pp"] > 1) | (is_experts & c["gather_once"])
            once += np.where(kept, gather, 0) + np.where(reduces_once, reduce, 0)
            several += np.where(kept, 0, 2 * gather) + np.where(reduces_once, 0, reduce)
            once += 2 * self._ring(MASTER * size / ranks, c["dp_replicate"], stage, layers)
        waits = np.maximum(0, several - work) + fit.fsdp_exposed * np.minimum(several, work)
        return np.asarray(c["micro_batches"] * waits + np.maximum(once - fit.dp_hidden * backward, 0.15 * once))

    def _ring(self, size: np.ndarray, ranks: np.ndarray, span: np.ndarray, calls: float) -> np.ndarray:
        """Return the seconds of collectives over `ranks` within `span` neighbouring GPUs: as `traffic._ring` and
        `step_time.exchange_time`.
        """
        gpu, fit = self.gpu, self.calibration
        sent = size * (ranks - 1) / ranks
        inside = span <= gpu.domain
        members = np.clip(gpu.domain // np.maximum(1, span // ranks), 1, ranks)
        local = sent / (gpu.nvlink * 1e9 * fit.nvlink)
        across = np.where(inside, 0.0, sent / members / (gpu.network * 1e9 * fit.network))
        steps = np.where(inside, fit.latency_s, fit.network_latency_s) * calls * np.log2(np.maximum(ranks, 1))
        return np.asarray(np.where(ranks > 1, np.maximum(local, across) + steps, 0.0))

    def _optimizer_time(self, row: np.ndarray, c: Table) -> np.ndarray:
        layout, fit = c["layout"], self.calibration
        held = row @ self.counts.stored[:, layout]
        whole = row @ (self.counts.dense[:, layout] + self.counts.experts[:, layout])
        ranks = c["pp"] * c["dp"] * c["cp"] * c["tp"]
        traffic = 30 * held + np.where((c["pp"] > 1) | c["reduce_once"], 6 * whole, 0)
        return np.asarray(
            traffic / (self.gpu.hbm * 1e9 * fit.stream) + fit.host_step_s * (1 + 0.1 * np.log2(np.maximum(ranks, 1)))
        )


def total(parts: Table) -> np.ndarray:
    """Return the seconds of a step."""
    return np.asarray(sum(parts[name] for name in PARTS))
