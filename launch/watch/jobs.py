"""SLURM's state of the watched runs, asked in the background because `scontrol` may take its time."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from core.errors import LeviathanError
from launch.slurm.job import jobs
from launch.slurm.requeue import stored_state
from launch.slurm.submit import SILENT, UNKNOWN, ask

EVERY_S = 30.0
"""Seconds between two questions to SLURM."""
WORDS = {UNKNOWN: "ended", SILENT: "is unknown: SLURM does not answer"}


class JobStates:
    """The state of the newest job of each run, if SLURM is there. `problem`: why the states are unknown."""

    def __init__(self, directory: Path, runs: Sequence[Path]) -> None:
        self.directory, self.runs, self.problem = directory, [run.resolve() for run in runs], ""
        self._states: dict[Path, str] = {}
        self._done = threading.Event()

    def of(self, run: Path) -> str:
        """Return a few words about a run's job, such as `job 17 RUNNING`, or an empty text."""
        return self._states.get(run.resolve(), "")

    def start(self) -> None:
        """Ask now and every `EVERY_S` seconds until `stop`."""
        threading.Thread(target=self._repeat, name="jobs", daemon=True).start()

    def stop(self) -> None:
        self._done.set()

    def _repeat(self) -> None:
        while True:
            self.ask()
            if self._done.wait(EVERY_S):
                return

    def ask(self) -> None:
        """Ask SLURM once about all jobs of the watched runs."""
        if shutil.which("scontrol") is None or not self.directory.is_dir():
            return
        found: dict[Path, str] = {}
        try:
            for job in jobs(self.directory):  # oldest first
                runs = [path.resolve() for path in job.runs]
                if not set(runs) & set(self.runs):
                    continue
                for task, (run, status) in enumerate(zip(runs, ask(job), strict=True)):
                    state = WORDS.get(status.state, str(status))
                    excluded = stored_state(job.folder, task)[0].excluded
                    words = f", excluded nodes: {', '.join(excluded)}" if excluded else ""
                    found[run] = f"job {job.id_of(task)} {state}{words}"
            self.problem = ""
        except (OSError, ValueError, LeviathanError) as error:
            self.problem = f"{self.directory}: {error}"
        self._states = found
