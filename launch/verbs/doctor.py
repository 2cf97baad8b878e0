"""The verb `doctor`: check this machine and installation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import check_numbers
from launch.diagnose.machine import check_processes
from parallel.layout import ParallelConfig


@dataclass(frozen=True)
class DoctorConfig:
    """Check hardware, packages and disks. launch.slurm.doctor=true checks every node of a SLURM job."""

    json: bool = False
    """Print the findings as JSON."""
    cache: str = "~/.cache/leviathan"
    """Folder of the cache. Its disk and the disk of `runs` are checked."""
    runs: str = "runs"
    """Folder for runs. Its disk is checked, and `ranks` writes and reads a test file there."""
    ranks: int = 0
    """Start this many ranks on this machine, and time the disk and each axis of `parallel`; 0: start none."""
    oversubscribe: bool = False
    """Allow more ranks than this machine can run well."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        check_numbers(self, not_negative=("ranks",))
        if self.ranks:
            self.parallel.resolve(self.ranks)


def run(config: DoctorConfig) -> int:
    """Print the findings; return 1 if a package that every run needs is missing or this machine is faulty, else 0."""
    from launch.diagnose.doctor import examine, measure, table

    check_processes("ranks", config.ranks, config.oversubscribe)
    found = examine([Path(config.cache).expanduser(), Path(config.runs).expanduser()])
    if not config.json:
        print(table(found), flush=True)
    code = measure(config.ranks, config.parallel, config.runs, found, quiet=config.json) if config.ranks else 0
    if config.json:
        print(json.dumps(found, indent=2))
    return 1 if found["problems"] or code else 0
