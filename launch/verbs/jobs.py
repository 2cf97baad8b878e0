"""The verb `jobs`: list, show and cancel the SLURM jobs that were submitted from here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from core.errors import ConfigError, LeviathanError
from core.exit_codes import FAILED
from core.files import local_path
from launch.slurm.job import SlurmJob, jobs
from launch.slurm.requeue import CANCEL
from launch.slurm.submit import SILENT, UNKNOWN, JobStatus, ask, command, follow
from train.run_directory import read_lines


class JobsAction(Enum):
    list = "list"
    show = "show"
    cancel = "cancel"


@dataclass(frozen=True)
class JobsConfig:
    """Actions: `list` all jobs, `show` a job's log until the job ends, `cancel` a job after it has saved."""

    action: JobsAction = JobsAction.list
    """What to do; `show` and `cancel` need `job`."""
    job: str | None = None
    """Name or SLURM number of the job to show or cancel."""
    directory: str = "jobs"
    """Folder of the jobs, as in launch.slurm.directory."""


def run(config: JobsConfig) -> int:
    directory = local_path("directory", config.directory).absolute()
    known = jobs(directory)
    if config.action is JobsAction.list:
        answers = [ask(job) for job in known]
        print(table(known, answers) if known else f"no job was submitted from here ({directory})")
        return FAILED if any(is_silent(answer) for answer in answers) else 0
    job = _find(known, config)
    if config.action is JobsAction.show:
        if is_silent(ask(job)):
            raise LeviathanError(f"SLURM does not answer about job {job.number}; its log: {job.log(0)}")
        try:
            return follow(job, print)
        except KeyboardInterrupt:
            return 0
    return cancel(job)


def _find(known: list[SlurmJob], config: JobsConfig) -> SlurmJob:
    for job in reversed(known):
        if config.job in (job.name, job.number):
            return job
    usage = f"which one? leviathan jobs {config.action.name} NAME"
    reason = usage if config.job is None else "no such job was submitted from here"
    raise ConfigError("job", config.job, reason, [job.name for job in known[-3:]])


def cancel(job: SlurmJob) -> int:
    """Ask the active runs to save and end. When called again, or with no active run, let SLURM end the job at once."""
    again = (job.folder / CANCEL).exists()
    running = [job.id_of(task) for task, status in enumerate(ask(job)) if status.state == "RUNNING"]
    (job.folder / CANCEL).touch()
    if again or not running:
        command("scancel", job.number)
        print(f"job {job.number} ({job.name}) is ended")
        return 0
    for number in running:
        command("scancel", "--signal=USR1", number)
    if len(running) < len(job.runs):
        command("scancel", "--state=PENDING", job.number)
    print(f"job {job.number} ({job.name}) saves and then ends; cancel again to end it at once")
    return 0


def is_silent(answer: list[JobStatus]) -> bool:
    return any(status.state == SILENT for status in answer)


def table(known: list[SlurmJob], answers: list[list[JobStatus]]) -> str:
    """Return a line per run: its number, name, SLURM state, and the step and loss of its last log line."""
    lines = [("job", "run", "state", "step", "loss")]
    for job, answer in zip(known, answers, strict=True):
        for task, (path, status) in enumerate(zip(job.runs, answer, strict=True)):
            state = "ended, SLURM no longer knows how" if status.state == UNKNOWN else status.state
            lines.append((job.id_of(task), path.name, state, *_progress(path)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ((f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _progress(run: Path) -> tuple[str, str]:
    lines = list(read_lines(run / "metrics.jsonl", {"step": int, "loss": float}))
    return (str(lines[-1]["step"]), f"{lines[-1]['loss']:.4f}") if lines else ("-", "-")
