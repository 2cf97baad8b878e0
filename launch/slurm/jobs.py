"""The verb `jobs`: list, show and cancel the SLURM jobs that were submitted from here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from core.errors import ConfigError
from launch.slurm.requeue import CANCEL
from launch.slurm.submit import UNKNOWN, SlurmJob, ask, command, follow, jobs
from train.run_directory import read_lines


class JobsAction(Enum):
    list = "list"
    show = "show"
    cancel = "cancel"


@dataclass(frozen=True)
class JobsConfig:
    """`job`: a name or SLURM's number, for show (its log, to its end) and cancel (it saves first). `directory`: as in
    launch.slurm.directory.
    """

    action: JobsAction = JobsAction.list
    job: str | None = None
    directory: str = "jobs"


def run(config: JobsConfig) -> int:
    directory = Path(config.directory).expanduser().absolute()
    known = jobs(directory)
    if config.action is JobsAction.list:
        print(table(known) if known else f"no job was submitted from here ({directory})")
        return 0
    job = _find(known, config)
    if config.action is JobsAction.show:
        try:
            return follow(job, print)
        except KeyboardInterrupt:
            return 0
    return cancel(job)


def cancel(job: SlurmJob) -> int:
    """Ask the runs that run to save and end; asked once more, or where nothing runs, SLURM ends the job."""
    again = (job.folder / CANCEL).exists()
    running = [job.id_of(task) for task, told in enumerate(ask(job)) if told.state == "RUNNING"]
    (job.folder / CANCEL).touch()
    if again or not running:
        command("scancel", job.number)
        print(f"job {job.number} ({job.name}) is ended")
        return 0
    for number in running:
        command("scancel", "--signal=USR1", number)
    if len(running) < len(job.runs):
        command("scancel", "--state=PENDING", job.number)
    print(f"job {job.number} ({job.name}) is asked to end; it saves first (to end it at once, ask again)")
    return 0


def table(known: list[SlurmJob]) -> str:
    """A line per run: its number, what SLURM says, how far it is."""
    rows = [("job", "run", "state", "step", "of last line: loss")]
    for job in known:
        for task, (path, told) in enumerate(zip(job.runs, ask(job), strict=True)):
            rows.append((job.id_of(task), path.name, _word(told.state), *_progress(path)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _word(state: str) -> str:
    return "over, SLURM has forgotten how" if state == UNKNOWN else state


def _progress(run: Path) -> tuple[str, str]:
    path = run / "metrics.jsonl"
    lines = [line for line in read_lines(path) if "loss" in line] if path.exists() else []
    return (str(lines[-1]["step"]), f"{lines[-1]['loss']:.4f}") if lines else ("-", "-")


def _find(known: list[SlurmJob], config: JobsConfig) -> SlurmJob:
    if config.job is None:
        raise ConfigError(
            "job", None, f"which one? leviathan jobs {config.action.name} NAME", [job.name for job in known[-3:]]
        )
    for job in reversed(known):
        if config.job in (job.name, job.number):
            return job
    raise ConfigError("job", config.job, "no such job was submitted from here", [job.name for job in known[-3:]])
