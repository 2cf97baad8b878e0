"""Compare the planner with a table of published measurements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from launch.plan.calibration import Calibration
from launch.plan.memory import GIB, StageMemory, stage_memories
from launch.plan.readers import open_table
from launch.plan.readers.common import Measured, MemoryKind, Skipped, Table
from launch.plan.scores import MeasuredLayout, Pair, error_scores, fit_scores, memory_scores, regret_scores
from launch.plan.step_time import step_time


@dataclass(frozen=True)
class Prediction:
    """What the planner says of one row."""

    row: Measured
    step_s: float
    stages: list[StageMemory]
    usable_bytes: float

    @property
    def memory_bytes(self) -> float:
        """The memory that the row's source measured."""
        match self.row.memory_kind:
            case MemoryKind.last_rank_peak:
                return self.stages[-1].peak
            case MemoryKind.first_rank_peak:
                return self.stages[0].peak
            case MemoryKind.fullest_rank_peak:
                return max(stage.peak for stage in self.stages)
            case MemoryKind.static:
                return self.stages[0].static

    @property
    def fits(self) -> bool:
        return max(stage.peak for stage in self.stages) <= self.usable_bytes


def predict(row: Measured, calibration: Calibration) -> Prediction:
    job = row.job
    usable = job.gpu.memory_gib * GIB * calibration.usable
    return Prediction(row, step_time(job, calibration).total, stage_memories(job, calibration), usable)


def validate(path: Path, calibration: Calibration) -> dict[str, Any]:
    """Return the report on a table: see docs/plan.md for its keys."""
    table = open_table(path)
    return report(table, predict_all(table, calibration))


def predict_all(table: Table, calibration: Calibration) -> list[Prediction]:
    """Return a prediction for each row. Rows whose layout is impossible join the skipped ones."""
    found = []
    for row in table.rows:
        try:
            found.append(predict(row, calibration))
        except ConfigError as error:
            table.skipped.append(Skipped(row.number, f"{error.key}={error.value}: {error.reason}"))
    return found


def report(table: Table, predictions: list[Prediction]) -> dict[str, Any]:
    rows = [one.row for one in predictions]
    return {
        "time": error_scores([Pair(one.step_s, one.row.step_s) for one in predictions if one.row.step_s]),
        "memory": memory_scores(
            [Pair(one.memory_bytes, one.row.memory_bytes) for one in predictions if one.row.memory_bytes]
        ),
        "fits": fit_scores((one.fits, one.row.fits) for one in predictions if one.row.fits is not None),
        "regret": regret_scores(_trials(predictions)),
        "rival": {
            "time": error_scores(
                [Pair(row.rival_step_s, row.step_s) for row in rows if row.rival_step_s and row.step_s]
            ),
            "memory": memory_scores(
                [
                    Pair(row.rival_memory_bytes, row.memory_bytes)
                    for row in rows
                    if row.rival_memory_bytes and row.memory_bytes
                ]
            ),
        },
        "skipped": [_skipped(one) for one in table.skipped],
    }


def _trials(predictions: list[Prediction]) -> Iterator[MeasuredLayout]:
    """Yield the layouts that ran and that the planner would allow."""
    for one in predictions:
        if one.row.group is not None and one.row.step_s and one.fits:
            job = one.row.job
            tokens = job.gbs * job.seq
            yield MeasuredLayout(one.row.group, one.step_s / tokens, tokens / one.row.step_s)


def _skipped(one: Skipped) -> dict[str, Any]:
    return {"row": one.number, "reason": one.reason}


def summary(content: dict[str, Any]) -> str:
    """Return the report as lines for a terminal."""
    lines = []
    for name, scores in (("step time", content["time"]), ("rival's step time", content["rival"]["time"])):
        if scores["n"]:
            errors = f"median error {scores['median_error']:.1%}, mean {scores['mean_error']:.1%}"
            lines.append(f"{name:<20} {errors}, {scores['n']} rows")
    for name, scores in (("memory", content["memory"]), ("rival's memory", content["rival"]["memory"])):
        if scores["n"]:
            errors = f"median error {scores['median_error']:.1%}, mean {scores['mean_error']:.1%}"
            lines.append(f"{name:<20} {errors}, at most {scores['worst_under']:.1%} too low, {scores['n']} rows")
    fits, regret = content["fits"], content["regret"]
    if fits["balanced_accuracy"] is not None:
        lines.append(f"{'fits':<20} balanced accuracy {fits['balanced_accuracy']:.1%}, {fits['n']} rows")
    if regret["groups"]:
        best = f"mean {regret['mean']:.1%} of the best layout's throughput, worst {regret['worst']:.1%}"
        lines.append(f"{'chosen layouts':<20} {best}, {regret['groups']} groups")
    lines.append(f"{'skipped':<20} {len(content['skipped'])} rows")
    return "\n".join(lines)
