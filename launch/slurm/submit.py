"""`launch=slurm`: write the job's folder, render the batch script, submit it and show its log.

A job's folder `jobs/NAME` contains `config-0.yaml`, `config-1.yaml`, ... (the resolved configuration of each run;
nodes read no other), `job.sh`, `job.json` (with SLURM's job number), a log per array task, and the state of
launch/slurm/requeue.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import ConfigError, LeviathanError, UnreadableFileError
from core.files import read_text, write_text
from launch.config import LaunchConfig, SlurmConfig, check_interval
from launch.slurm.job import SlurmJob, jobs, known, load_job, record
from launch.slurm.requeue import AGAIN, CANCEL
from train.config import TrainConfig
from train.run_directory import RunDirectory, read_config, read_lines, write_config

UNKNOWN, SILENT = "UNKNOWN", "SILENT"
FAILURES = ["BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"]
RENDERED = "# Rendered by `leviathan train launch=slurm`"
_STALE = re.compile(rf"config-\d+\.yaml|requeue-\d+\.json|again-\d+\.sh|log-\d+\.txt|job\.json|{CANCEL}")
"""Files of the job before in a folder. They are removed when it is used again."""
NO_LOG = "is it on a file system that the nodes share?"


@dataclass(frozen=True)
class JobStatus:
    """SLURM's state of a run, and the reason for it."""

    state: str
    reason: str = "None"

    @property
    def is_over(self) -> bool:
        return self.state in ("COMPLETED", UNKNOWN, *FAILURES)

    def __str__(self) -> str:
        return f"{self.state} ({self.reason})" if self.state == "PENDING" and self.reason != "None" else self.state


def command(*arguments: str) -> str:
    """Run a SLURM command and return its output. Raises `LeviathanError` with SLURM's message if it fails."""
    done = _run(*arguments)
    if done.returncode:
        message = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise LeviathanError(message if message.startswith(arguments[0]) else f"{arguments[0]}: {message}")
    return done.stdout


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(arguments[0]) is None:
        reason = "is not on this machine: submit from a login node of a SLURM cluster, or use launch=torchrun"
        raise ConfigError("launch", "slurm", f"{arguments[0]} {reason}")
    return subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **environment})


def submit_and_follow(configs: list[TrainConfig], launch: LaunchConfig) -> int:
    """Submit a job, or an array job for a sweep. Return 0, or 1 if the job was followed and a run failed."""
    if not launch.slurm.submit:
        job = prepare(configs, launch)
        print(f"written, not submitted: sbatch {shlex.quote(str(job.script))}")
        return 0
    job = submit(configs, launch)
    print(f"job {job.number}: {job.folder}", flush=True)
    if not launch.slurm.follow:
        return 0
    try:
        return follow(job, print)
    except KeyboardInterrupt:
        print(f"\nthe job continues; to show it again: leviathan jobs show {job.name}", file=sys.stderr)
        return 0


def submit(configs: list[TrainConfig], launch: LaunchConfig) -> SlurmJob:
    """Submit a job. Raises `ConfigError` for invalid settings, and with SLURM's reason if SLURM rejects the job."""
    command("sbatch", "--version")
    if launch.slurm.partition is not None:
        _check_partition(launch.slurm.partition.split(","))
    job = prepare(configs, launch)
    try:
        number = command("sbatch", "--parsable", str(job.script)).strip().partition(";")[0]
    except LeviathanError as error:
        raise ConfigError("launch", "slurm", f"the job was rejected: {error}") from None
    record(job.folder, number, job.runs)
    return replace(job, number=number)


def prepare(configs: list[TrainConfig], launch: LaunchConfig) -> SlurmJob:
    """Write the folder of a job: its script and a configuration for each run. Needs no cluster."""
    slurm = launch.slurm
    runs = [RunDirectory.of(config) for config in configs]
    for config, run in zip(configs, runs, strict=True):
        check_interval(config, slurm, _seconds_per_step(run))
    name = runs[0].path.name.removesuffix("-0" if len(runs) > 1 else "")
    folder = Path(slurm.directory).expanduser().absolute() / name
    for before in known(folder):
        if not all(status.is_over for status in ask(before)):
            raise ConfigError("run.name", name, f"job {before.number} of that name has not ended", ["another name"])
    if any(sign in str(folder) for sign in " %"):
        raise ConfigError("launch.slurm.directory", str(folder), "must not contain spaces or %; neither must run.name")
    if folder.is_dir() and any(folder.iterdir()) and not _is_rendered(folder / "job.sh"):
        raise ConfigError("run.name", name, f"{folder} holds files that are not of a job; choose another name")
    job = SlurmJob(folder, "", [run.path.absolute() for run in runs])
    script = render(job, launch, Path.cwd())
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*"):
        if _STALE.fullmatch(stale.name):
            stale.unlink()
    for index, config in enumerate(configs):
        write_config(job.config(index), config)
    write_text(job.script, script)
    return job


def _is_rendered(script: Path) -> bool:
    try:
        return RENDERED in read_text(script)
    except (OSError, UnreadableFileError):
        return False


def render(job: SlurmJob, launch: LaunchConfig, cwd: Path) -> str:
    """Return the batch script of a job that runs in the folder `cwd`.

    SLURM copies the script at submission, so what may change later is read from the job's folder.
    """
    slurm, array = launch.slurm, len(job.runs) > 1
    at_once = f"%{slurm.max_concurrent}" if slurm.max_concurrent else ""
    requests = {
        "job-name": job.name,
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        **{key: getattr(slurm, key) for key in ("time", "partition", "account", "constraint", "gres")},
        "cpus-per-task": slurm.cpus,
        "mem": slurm.memory,
        "exclude": ",".join(slurm.exclude) or None,
        "dependency": _dependency(slurm, job.folder.parent),
        "array": f"0-{len(job.runs) - 1}{at_once}" if array else None,
        "chdir": shlex.quote(str(cwd)),
        "output": job.folder / ("log-%a.txt" if array else "log-0.txt"),
        "open-mode": "append",
        "signal": f"USR1@{slurm.save_s}",
    }
    lines = [f"--{key}={value}" for key, value in requests.items() if value is not None]
    lines += ["--requeue", *(["--exclusive"] if slurm.exclusive else []), *slurm.options]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in slurm.environment.items()]
    exports += [f"export SRUN_CPUS_PER_TASK={slurm.cpus}"] if slurm.cpus else []  # srun does not inherit sbatch's value
    python = shlex.join([*shlex.split(slurm.container or ""), slurm.python or sys.executable])
    srun, folder = "srun --kill-on-bad-exit=0 --wait=300 --cpu-bind=none", shlex.quote(str(job.folder))
    return "\n".join(
        [
            "#!/bin/bash",
            f"{RENDERED}; the configuration is in {job.folder}.",
            *(f"#SBATCH {line}" for line in lines),
            "",
            "set -e",
            *(f"module load {shlex.quote(module)}" for module in slurm.modules),
            "export PYTHONSAFEPATH=1",
            *exports,
            *slurm.setup,
            "set +e",
            "",
            "# srun's tasks get these signals too; this shell waits until they have saved",
            "trap : TERM USR1",
            "step() {",
            f'    {srun} {python} -u -m launch.slurm.job_step "$1" {folder} &',
            "    pid=$!",
            "    wait $pid; code=$?",
            "    while kill -0 $pid 2>/dev/null; do wait $pid; code=$?; done  # a signal ends only `wait`",
            "    wait $pid 2>/dev/null; last=$?; [ $last = 127 ] || code=$last  # srun may have ended meanwhile",
            "}",
            *(["step doctor", "[ $code != 0 ] || step train"] if slurm.doctor else ["step train"]),
            f"{python} -m launch.slurm.requeue {folder} $code; code=$?",
            f"[ $code != {AGAIN} ] || {{ code=0; . {folder}/again-${{SLURM_ARRAY_TASK_ID:-0}}.sh; }}",
            "exit $code",
            "",
        ]
    )


def follow(job: SlurmJob, show: Callable[[str], Any], poll_s: float = 1.0) -> int:
    """Show the logs of a job until all its runs have ended. Return 0 if all completed, else 1."""
    shown, before = [0] * len(job.runs), [JobStatus("")] * len(job.runs)
    silent_since = time.monotonic()
    while True:
        now = ask(job)
        for task, status in enumerate(now):
            shown[task] = _show_new(job, task, shown[task], show)
            if status.state != before[task].state:
                show(f"[{job.id_of(task)}] {status}")
        before = now
        if all(status.is_over for status in now):
            break
        if any(shown) or all(status.state != "RUNNING" for status in now):
            silent_since = time.monotonic()
        elif time.monotonic() - silent_since > 120:
            show(f"the job runs, but there is no log in {job.folder}: {NO_LOG}")
            silent_since = time.monotonic()
        time.sleep(poll_s)
    time.sleep(poll_s)
    for task in range(len(job.runs)):
        shown[task] = _show_new(job, task, shown[task], show)
        if not shown[task]:
            show(f"[{job.id_of(task)}] left no log in {job.folder}: {NO_LOG}")
    return 0 if all(status.state == "COMPLETED" for status in before) else 1


def ask(job: SlurmJob) -> list[JobStatus]:
    """Query SLURM once for the status of each run: UNKNOWN if SLURM no longer knows it, SILENT if the query fails."""
    whole_lists = {"SLURM_BITSTR_LEN": "0"}  # else a long list of tasks ends in "..."
    done = _run("scontrol", "show", "job", "-o", job.number, **whole_lists)
    if done.returncode and "Invalid job id" not in done.stderr:
        return [JobStatus(SILENT)] * len(job.runs)
    return parse_status(done.stdout if done.returncode == 0 else "", len(job.runs))


def parse_status(answer: str, runs: int) -> list[JobStatus]:
    """Parse the output of `scontrol show job -o NUMBER`, which has all pending tasks of an array on one line."""
    found = [JobStatus(UNKNOWN)] * runs
    for line in answer.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        status = JobStatus(fields.get("JobState", UNKNOWN), fields.get("Reason", "None"))
        for task in _tasks(fields.get("ArrayTaskId", "0"), runs):
            found[task] = status
    return found


def _tasks(text: str, runs: int) -> list[int]:
    """Parse SLURM's list of array tasks: 3, 0-2, 1,4-6, 0-6:2, 0-3%2 (at most two concurrently). Return those below
    `runs`.
    """
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        if span := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?", part, re.ASCII):
            first, last, step = (int(number or 0) for number in span.groups())
            found += range(first, min(max(first, last) + 1, runs), step or 1)
    return found


def _show_new(job: SlurmJob, task: int, offset: int, show: Callable[[str], Any]) -> int:
    """Show the complete lines of a log after `offset`. Return the offset of the end of the last line shown."""
    try:
        with open(job.log(task), "rb") as file:
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return offset
    whole = content[: content.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        show(f"[{job.id_of(task)}] {line}" if len(job.runs) > 1 else line)
    return offset + len(whole)


def _check_partition(names: list[str]) -> None:
    there = command("sinfo", "--noheader", "--format=%R").split()
    if unknown := [name for name in names if name not in there]:
        raise ConfigError("launch.slurm.partition", unknown[0], "no such partition", sorted(set(there)))


def _dependency(slurm: SlurmConfig, directory: Path) -> str | None:
    """Replace each name of a job in `directory` in `slurm.dependency` by SLURM's number of that job."""
    if slurm.dependency is None:
        return None
    parts = slurm.dependency.split(":")
    for index, part in enumerate(parts[1:], start=1):
        if not re.fullmatch(r"\d+([_+]\S+)?", part):
            if not (directory / part / "job.json").exists():
                known = [job.name for job in jobs(directory)]
                reason = f"{part} is neither a job number nor a job in {directory}"
                raise ConfigError("launch.slurm.dependency", slurm.dependency, reason, known[-3:])
            parts[index] = load_job(directory / part).number
    return ":".join(parts)


def _seconds_per_step(run: RunDirectory) -> float | None:
    """Return the seconds per step, computed from the last speed in the run's metrics file, or None without one."""
    if not run.metrics.exists() or not run.config_file.exists():
        return None
    lines = read_lines(run.metrics, {"tokens_per_second": float})
    rates = [line["tokens_per_second"] for line in lines if line["tokens_per_second"] > 0]
    training = read_config(run.config_file).training
    return training.global_batch_size * training.seq_len / rates[-1] if rates else None
