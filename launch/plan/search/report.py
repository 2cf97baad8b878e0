"""What the search found, for a terminal, as a preset for `train`, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from core.files import write_json, write_text
from launch.plan.memory import GIB
from launch.plan.search.finalists import LayoutPlan, as_values
from launch.plan.search.search import PlannedRun, SearchResult
from launch.plan.search.speed import PARTS
from launch.plan.search.uncertainty import ErrorBar, RunTraits, error_bar, short
from model.flops import count_parameters, training_flops
from precision.config import Backend

PRESET = "plan"
"""Name of the preset of the group `parallel`."""
NOT_TIMED = "the vision encoder's parameters are counted, its time and its activations are not"


class SearchReport:
    """A search's result with what is derived from it."""

    def __init__(self, job: PlannedRun, result: SearchResult) -> None:
        self.job, self.result = job, result
        self.gpu, self.world = job.cluster.description, job.cluster.gpus
        self.tokens = job.run.seq_len * job.run.global_batch_size
        self.parameters = count_parameters(job.model)
        self.flops = training_flops(job.model, job.run.seq_len).total

    @property
    def plans(self) -> list[LayoutPlan]:
        return self.result.plans

    def bar(self, plan: LayoutPlan, what: str) -> ErrorBar:
        """Return the error bar of a plan's time or memory."""
        gpu = self.gpu
        quantised = plan.precision.backend is not Backend.native
        traits = RunTraits(
            gpu.generation.value, gpu.name, self.job.model.has_experts, quantised, self.world, self.parameters.total
        )
        return error_bar(traits, what)

    def rate(self, plan: LayoutPlan) -> float:
        """Return tokens per second and GPU."""
        return self.tokens / plan.step_s / self.world

    def mfu(self, plan: LayoutPlan) -> float:
        """Return model FLOPs per second over the dense peak in bf16."""
        return self.rate(plan) * self.flops / self.gpu.peak("bf16")

    def settings(self, plan: LayoutPlan) -> str:
        """Return the overrides that a run needs beside the preset."""
        run = self.job.run
        sizes = f"training.seq_len={run.seq_len} training.global_batch_size={run.global_batch_size}"
        return f"precision={plan.precision.value} {sizes} training.micro_batch_size={plan.micro_batch_size}"

    def lines(self) -> Iterator[str]:
        """Yield the report for a terminal."""
        run, result = self.job.run, self.result
        total, active = short(self.parameters.total), short(self.parameters.active)
        yield f"{total} parameters, {active} active, on {self.world:,} {self.gpu.name}"
        yield f"{run.global_batch_size:,} sequences of {run.seq_len:,} tokens per step, imbalance {run.imbalance:g}"
        yield f"{result.tried:,} candidates with room for their state, {result.fitting:,} fit"
        yield "rejected:"
        for reason, count in result.rejected.most_common():
            yield f"  {count:>12,}  {reason}"
        yield ""
        yield f"{'':>2}  {'step':>8}  {'tok/s/GPU':>9}  {'MFU':>5}  {'memory':>9}  layout"
        for place, plan in enumerate(self.plans, start=1):
            more = f"mbs{plan.micro_batch_size} {plan.precision.value} recompute={plan.layout.recompute.value}"
            figures = f"{plan.step_s:>7.2f}s  {self.rate(plan):>9,.0f}  {self.mfu(plan):>5.1%}"
            yield f"{place:>2}  {figures}  {plan.memory / GIB:>5.1f} GiB  {plan.words} {more}"
        best = self.plans[0]
        yield ""
        yield "seconds of the best: " + _parts({name: best.seconds[name] for name in PARTS}, 1.0, "{:.2f}")
        yield f"GiB of its rank {best.fullest.first} of pp: " + _parts(best.fullest.parts, GIB, "{:.1f}")
        yield f"error bar of step times: {self.bar(best, 'time').words}"
        yield f"error bar of memory: {self.bar(best, 'memory').words}"
        if self.job.model.vision is not None:
            yield f"note: {NOT_TIMED}"

    def values(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "gpu": self.gpu.name,
            "gpus": self.world,
            "parameters": vars(self.parameters),
            "seq_len": self.job.run.seq_len,
            "global_batch_size": self.job.run.global_batch_size,
            "rejected": dict(self.result.rejected.most_common()),
            "fitting": self.result.fitting,
            "plans": [self._plan(plan) for plan in self.plans],
        }

    def _plan(self, plan: LayoutPlan) -> dict[str, Any]:
        time, memory = self.bar(plan, "time"), self.bar(plan, "memory")
        return {
            "parallel": as_values(plan),
            "micro_batch_size": plan.micro_batch_size,
            "precision": plan.precision.value,
            "step_s": plan.step_s,
            "step_s_between": [plan.step_s * time.low, plan.step_s * time.high],
            "seconds": plan.seconds,
            "tokens_per_second": self.tokens / plan.step_s,
            "mfu": self.mfu(plan),
            "memory_bytes": plan.memory,
            "memory_bytes_between": [plan.memory * memory.low, plan.memory * memory.high],
            "stages": [{"first": one.first, "ranks": one.ranks, "bytes": one.parts} for one in plan.stages],
        }

    def write(self, folder: Path) -> list[Path]:
        """Write plan.json and the preset of the best layout. Return their paths."""
        preset = folder / "parallel" / f"{PRESET}.yaml"
        preset.parent.mkdir(parents=True, exist_ok=True)
        best = self.plans[0]
        comment = (
            f"# Planned for {short(self.parameters.total)} parameters on {self.world:,} {self.gpu.name}. It needs:\n"
        )
        write_text(preset, f"{comment}# {self.settings(best)}\n{yaml.safe_dump(as_values(best), sort_keys=False)}")
        values = folder / "plan.json"
        write_json(values, self.values())
        return [preset, values]


def _parts(parts: dict[str, float], unit: float, form: str) -> str:
    shown = {name: form.format(value / unit) for name, value in parts.items()}
    return ", ".join(f"{name} {text}" for name, text in shown.items() if float(text))
