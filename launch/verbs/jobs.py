"""The verb `jobs`: list, show and cancel the SLURM jobs that were submitted from here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from core.errors import ConfigError
from launch.slurm.jobs import cancel, table
from launch.slurm.submit import SlurmJob, follow, jobs


class JobsAction(Enum):
    list = "list"
    show = "show"
    cancel = "cancel"


@dataclass(frozen=True)
class JobsConfig:
    """Actions: `list` all jobs, `show` a job's log until the job ends, `cancel` a job after it has saved."""

    action: JobsAction = JobsAction.list
    job: str | None = None
    """Name or SLURM number of the job to show or cancel."""
    directory: str = "jobs"
    """As in launch.slurm.directory."""


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


def _find(known: list[SlurmJob], config: JobsConfig) -> SlurmJob:
    names = [job.name for job in known[-3:]]
    if config.job is None:
        raise ConfigError("job", None, f"which one? leviathan jobs {config.action.name} NAME", names)
    for job in reversed(known):
        if config.job in (job.name, job.number):
            return job
    raise ConfigError("job", config.job, "no such job was submitted from here", names)
