"""Decide whether to requeue a SLURM job: `python -m launch.slurm.requeue FOLDER CODE`, at the end of the batch script.

A run that SLURM warned (time limit, preemption) is requeued. A failed run is requeued a few times. Nodes that hung,
that the doctor reported, whose replicas were wrong or that were slow when the attempt ended are excluded if SLURM can
run the job without them. A job ends when several attempts in a row reach no new checkpoint. This program may run in a
container without SLURM, so it writes SLURM commands to a file that the batch script executes.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.slurm.job_step import CANCELLED, FAILED_NODE, FINAL, WARNED

AGAIN = 75
"""Exit code: the batch script must run again-TASK.sh."""
MAX_WARNED = 3  # attempts in a row without a new checkpoint after which a warned run is not requeued
CANCEL = "cancelled"
"""Name of the file in a job's folder that `leviathan jobs cancel` creates."""


@dataclass(frozen=True)
class RequeueState:
    """State kept across requeues: the last checkpoint step, the number of attempts in a row without progress, the
    excluded nodes, and slow nodes, which are used only as a last resort.
    """

    step: int = -1
    fruitless: int = 0
    excluded: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()

    def after(self, step: int, bad_nodes: tuple[str, ...], slow_nodes: tuple[str, ...] = ()) -> RequeueState:
        """Return the state after an attempt that ended at checkpoint `step`."""
        fruitless = 0 if step > self.step else self.fruitless + 1
        excluded, slow = {*self.excluded, *bad_nodes}, {*self.slow, *slow_nodes}
        return RequeueState(step, fruitless, tuple(sorted(excluded)), tuple(sorted(slow - excluded)))

    def exclusions(self, configured: list[str]) -> list[list[str]]:
        """Return alternative lists of nodes to exclude, best first. `configured` nodes are excluded anyway."""
        faulty = sorted({*configured, *self.excluded})
        lists = dict.fromkeys((tuple(sorted({*faulty, *self.slow})), tuple(faulty)))
        return [list(nodes) for nodes in lists if set(nodes) > set(configured)]


@dataclass(frozen=True)
class RequeueDecision:
    """`exit_code` AGAIN requeues the job. With `if_running` it is requeued only if SLURM is not ending it. With
    `cancel` it is cancelled instead.
    """

    exit_code: int
    why: str
    if_running: bool = False
    cancel: bool = False


def decide(
    code: int, now: RequeueState, retries: int, bad_nodes: tuple[str, ...], nodes: int, cancelled: bool
) -> RequeueDecision:
    """Decide from srun's exit code whether to requeue the job. `now`: the state after this attempt. `retries`: allowed
    number of failures in a row without progress. `nodes`: number of nodes of the job.
    """
    resume = "to resume from its newest checkpoint" if now.step < 0 else f"to resume from step {now.step}"
    if code == 0:
        return RequeueDecision(0, "done")
    if cancelled:
        return RequeueDecision(AGAIN, "cancelled after saving", cancel=True)
    if code in (WARNED, 128 + signal.SIGUSR1):
        if now.fruitless >= MAX_WARNED:
            why = f"{now.fruitless} attempts reached no new checkpoint: increase launch.slurm.time"
            return RequeueDecision(1, f"not requeued: {why}")
        return RequeueDecision(AGAIN, f"requeued {resume}")
    if FINAL < code < CANCELLED:
        return RequeueDecision(code - FINAL, "not requeued: the same error would occur again")
    if code in (CANCELLED, 128 + signal.SIGTERM):
        why = f"stopped from outside; requeued {resume}, unless SLURM ends the job"
        return RequeueDecision(AGAIN, why, if_running=True)
    if code == FAILED_NODE and len(bad_nodes) >= nodes:
        return RequeueDecision(1, "not requeued: the doctor reports all nodes as faulty, so the cause is not a node")
    if now.fruitless > retries:
        return RequeueDecision(1, f"not requeued: {now.fruitless} attempts in a row reached no new checkpoint")
    if code == FAILED_NODE:
        return RequeueDecision(AGAIN, f"requeued: the doctor reports {', '.join(bad_nodes)} as faulty")
    return RequeueDecision(AGAIN, f"failed ({code}); requeued {resume}")


def commands(job: str, decision: RequeueDecision, exclusions: list[list[str]], script: Path) -> str:
    """Return shell lines that requeue or cancel the job.

    Nodes can only be excluded while the job is pending. SLURM delays a requeued job by two minutes; StartTime=now
    prevents this. The lines try the lists of `exclusions` in order, and exclude the first one that leaves SLURM enough
    nodes to run `script`. A requeue sends SIGTERM to this attempt, which ignores the signal from here on.
    """
    lines = ["trap '' TERM"]
    if decision.cancel:
        return "\n".join([*lines, f"scancel {job}", f"exit {CANCELLED}", ""])
    if decision.if_running:
        lines.append(f"scontrol show job -o {job} | grep -q JobState=RUNNING || exit {CANCELLED}")
    if exclusions:
        best, *others = (shlex.quote(",".join(nodes)) for nodes in exclusions)
        test = f'sbatch --test-only --exclude="$1" {shlex.quote(str(script))}'
        lines += [
            f"fits() {{ answer=$({test} 2>&1) || ! reason=$answer; }}",
            f'for nodes in {" ".join([best, *others])} \'\'; do [ -z "$nodes" ] || fits "$nodes" && break; done',
            f'[ "$nodes" = {best} ] || echo "leviathan: cannot exclude all of "{best}": SLURM: $reason"',
            '[ -z "$nodes" ] || echo "leviathan: excluded from now on: $nodes"',
        ]
    lines += [f"scontrol requeue {job} || exit 1", f"scontrol update JobId={job} StartTime=now"]
    if exclusions:
        lines.append(f'[ -z "$nodes" ] || scontrol update JobId={job} ExcNodeList="$nodes"')
    return "\n".join([*lines, ""])


def main(arguments: list[str]) -> int:
    """Decide, print the reason, and write the commands; return the job's exit code or AGAIN."""
    folder, code = Path(arguments[0]), int(arguments[1])
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    from core.config import build
    from core.files import write_json, write_text
    from launch.config import LaunchConfig
    from train.run_directory import RunDirectory, committed, read_config
    from train.stragglers import SLOW_HOSTS

    config = read_config(folder / f"config-{task}.yaml")
    launch = build(LaunchConfig, config.launch, "launch")
    run = RunDirectory.of(config)
    step = max((step for step, _ in committed(run.checkpoints)), default=-1)
    before, since = stored_state(folder, task)
    bad = () if code in (0, WARNED) else bad_nodes(folder / f"doctor-{task}", run.logs, since)
    slow = slow_nodes(run.logs / SLOW_HOSTS, since) if code else ()
    now = before.after(step, bad, slow)
    decision = decide(code, now, launch.slurm.requeues, bad, launch.nodes, (folder / CANCEL).exists())
    if slow:
        print(f"leviathan: slow until the end of this attempt: {', '.join(slow)}")
    print(f"leviathan: {decision.why}", flush=True)
    if decision.exit_code == AGAIN:
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        write_json(_state_file(folder, task), {**vars(now), "time": time.time()})
        lines = commands(job, decision, now.exclusions(launch.slurm.exclude), folder / "job.sh")
        write_text(folder / f"again-{task}.sh", lines)
    return decision.exit_code


def bad_nodes(doctor: Path, logs: Path, since: float) -> tuple[str, ...]:
    """Return the nodes that the doctor has reported, that have hung, or whose replicas were wrong, since `since`."""
    from core.files import read_json

    findings = doctor / "findings.json"
    reports = [read_json(findings, {"time": float, "bad_nodes": [str]})] if findings.exists() else []
    named = [(one["time"], one["bad_nodes"]) for one in reports]
    named += [(one["time"], one["hosts"]) for name in ("hangs", "corrupt") for one in _hosts(logs / f"{name}.jsonl")]
    return tuple(sorted({host for when, hosts in named if when > since for host in hosts}))


def slow_nodes(path: Path, since: float) -> tuple[str, ...]:
    """Return the nodes in the last line of `slow.jsonl` (train/stragglers.py), if this attempt wrote it."""
    lines = _hosts(path)
    return tuple(lines[-1]["hosts"]) if lines and lines[-1]["time"] > since else ()


def _hosts(path: Path) -> list[dict[str, Any]]:
    from train.run_directory import read_lines

    return list(read_lines(path, {"time": float, "hosts": [str]}))


def stored_state(folder: Path, task: int) -> tuple[RequeueState, float]:
    """Return the state after the previous attempt, and when that ended: for the first attempt, when it was submitted.
    Earlier hangs and findings belong to an older job of the same name.
    """
    from core.files import read_json

    path, job = _state_file(folder, task), folder / "job.json"
    if not path.exists():
        return RequeueState(), read_json(job, {"submitted": float})["submitted"] if job.exists() else 0.0
    stored = read_json(path, {"time": float, "step": int, "fruitless": int, "excluded": [str], "slow": [str]})
    excluded, slow = tuple(stored["excluded"]), tuple(stored["slow"])
    return RequeueState(stored["step"], stored["fruitless"], excluded, slow), stored["time"]


def _state_file(folder: Path, task: int) -> Path:
    return folder / f"requeue-{task}.json"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from core.process import run_process

    sys.exit(run_process(main))
