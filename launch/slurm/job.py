"""The folder of a SLURM job, and what `leviathan jobs` knows of it: `job.json` has SLURM's number and the runs."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from core.errors import DataError
from core.files import read_json, write_json
from train.run_directory import RunDirectory, read_config


@dataclass(frozen=True)
class SlurmJob:
    """A submitted job. `runs`: the directories of its runs, one per array task."""

    folder: Path
    number: str
    runs: list[Path]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def script(self) -> Path:
        return self.folder / "job.sh"

    def log(self, task: int) -> Path:
        return self.folder / f"log-{task}.txt"

    def config(self, task: int) -> Path:
        return self.folder / f"config-{task}.yaml"

    def id_of(self, task: int) -> str:
        """Return SLURM's id of one run."""
        return f"{self.number}_{task}" if len(self.runs) > 1 else self.number


def record(folder: Path, number: str, runs: list[Path]) -> None:
    """Write what `leviathan jobs` needs to know of a job."""
    stored = {"number": number, "runs": [str(path) for path in runs], "submitted": time.time()}
    write_json(folder / "job.json", stored)


def record_this_job(folder: Path) -> None:
    """Record the job in which this process runs, if a user submitted its script (`launch.slurm.submit=false`)."""
    number = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
    if [job.number for job in known(folder)] != [number]:
        configs = sorted(folder.glob("config-*.yaml"), key=lambda path: int(path.stem.removeprefix("config-")))
        record(folder, number, [RunDirectory.of(read_config(path)).path.absolute() for path in configs])


def jobs(directory: Path) -> list[SlurmJob]:
    """Return every job in `directory`, oldest first."""
    found = [job for folder in directory.glob("*") for job in known(folder)]
    return sorted(found, key=lambda job: (len(job.number), job.number))


def load_job(folder: Path) -> SlurmJob:
    stored = read_json(folder / "job.json", {"number": str, "runs": [str]})
    if not re.fullmatch(r"\d+", stored["number"], re.ASCII):  # an argument of SLURM's commands
        raise DataError(f"{folder / 'job.json'} holds no number of a job; remove that folder")
    return SlurmJob(folder.absolute(), stored["number"], [Path(path) for path in stored["runs"]])


def known(folder: Path) -> list[SlurmJob]:
    return [load_job(folder)] if (folder / "job.json").exists() else []
